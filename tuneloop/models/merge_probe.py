"""Proof of a merge: the merged model must say what base + adapter say, as PEFT computes it.

Legend: T tokens of a piece of a sequence, V vocabulary.
"""

import gc
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from tuneloop.errors import UserError
from tuneloop.models.load import DTYPES, default_device
from tuneloop.models.quiet import no_progress_bars
from tuneloop.progress import Progress

_PIECE_TOKENS = 64  # log-probs of one piece in float64: 64 x 150,000 x 8 bytes = 77 MB


@dataclass(frozen=True)
class ProbeResult:
    """How far the merged model is from base + adapter, over every next-token distribution of the probe.

    Attributes:
        prompts: number of sequences.
        tokens: number of predicted tokens.
        mean_kl: mean KL(base + adapter || merged), nats.
        max_logprob_difference: the largest gap of an actual token's log-prob, nats.
        top1_agreement: the share of positions where both find the same token most likely.
        adapter_kl: mean KL(base + adapter || base), nats: what the adapter changes, for comparison.
    """

    prompts: int
    tokens: int
    mean_kl: float
    max_logprob_difference: float
    top1_agreement: float
    adapter_kl: float


class _Divergence:
    """Sums over positions of how one distribution differs from a reference."""

    def __init__(self):
        self.kl = 0.0
        self.tokens = self.agreeing = 0
        self.max_difference = 0.0

    def add(self, reference_TV: torch.Tensor, other_TV: torch.Tensor, targets_T: torch.Tensor) -> None:
        p_TV, q_TV = reference_TV.double(), other_TV.double()
        # sum p log(p/q) + q - p: the added terms sum to 0 but for rounding, and make every summand non-negative.
        terms_TV = (p_TV - q_TV).mul_(p_TV.exp_()).add_(q_TV.exp_()).sub_(p_TV)
        self.kl += float(terms_TV.sum())
        gap_T = (reference_TV - other_TV).gather(-1, targets_T[:, None]).abs()
        self.max_difference = max(self.max_difference, float(gap_T.max()))
        self.agreeing += int((reference_TV.argmax(-1) == other_TV.argmax(-1)).sum())
        self.tokens += len(targets_T)


def probe_merge(
    base: Path, adapter: Path, merged: Path, sequences: Sequence[Sequence[int]], *, dtype: str = "float32"
) -> ProbeResult:
    """Compare `merged` with `base` + `adapter` on token sequences (prompt and completion) of two tokens or more.

    The base with the adapter is computed by PEFT, the merged model by transformers alone. One model is in memory at a
    time; the reference's log-probs wait on the disk.

    Args:
        dtype: both are computed in it. float32 shows the rounding of the merged weights and nothing else.

    Raises:
        UserError: no sequence has two tokens.
    """
    sequences = [sequence for sequence in sequences if len(sequence) > 1]
    if not sequences:
        raise UserError("the merge cannot be proven without prompts; give a data folder with held-out rows")
    to_base, to_merged = _Divergence(), _Divergence()
    with tempfile.TemporaryFile(dir=merged.parent) as spill, Progress("probe", 3 * len(sequences)) as progress:
        model = _load(base, dtype)
        tuned = PeftModel.from_pretrained(model, str(adapter)).eval()
        for sequence in sequences:
            for logprobs_TV, _ in _next_token_logprobs(tuned, sequence):
                logprobs_TV.cpu().numpy().tofile(spill)
            progress.advance()
        spill.seek(0)
        with tuned.disable_adapter():
            _compare(tuned, sequences, spill, to_base, progress)
        del model, tuned
        gc.collect()
        spill.seek(0)
        _compare(_load(merged, dtype), sequences, spill, to_merged, progress)
    return ProbeResult(
        prompts=len(sequences),
        tokens=to_merged.tokens,
        mean_kl=to_merged.kl / to_merged.tokens,
        max_logprob_difference=to_merged.max_difference,
        top1_agreement=to_merged.agreeing / to_merged.tokens,
        adapter_kl=to_base.kl / to_base.tokens,
    )


def require_close(probe: ProbeResult, tolerance: float) -> None:
    """Refuse a merged model that is not the model that was trained.

    Raises:
        UserError: the mean KL is beyond the tolerance, or the merged model is no nearer than the bare base is.
    """
    measured = f"mean KL {probe.mean_kl:.2g} nats, log-probs differ by up to {probe.max_logprob_difference:.2g}"
    if not probe.mean_kl <= tolerance:  # written so that NaN is refused
        raise UserError(f"the merged model differs from base + adapter ({measured}; tolerance {tolerance:g}); "
                        "set merge_adapter.dtype to float32, or raise merge_adapter.tolerance")  # fmt: skip
    if not probe.mean_kl < probe.adapter_kl:
        raise UserError(f"the merged model is no nearer to base + adapter ({measured}) than the bare base is "
                        f"({probe.adapter_kl:.2g}): rounding has swallowed the update; set merge_adapter.dtype to "
                        "float32, or train longer")  # fmt: skip


def _compare(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[Sequence[int]],
    spill,
    divergence: _Divergence,
    progress: Progress,
) -> None:
    for sequence in sequences:
        for logprobs_TV, targets_T in _next_token_logprobs(model, sequence):
            stored = np.fromfile(spill, dtype=np.float32, count=logprobs_TV.numel())
            reference_TV = torch.from_numpy(stored).view(logprobs_TV.shape).to(logprobs_TV.device)
            divergence.add(reference_TV, logprobs_TV, targets_T)
        progress.advance()


@torch.no_grad()
def _next_token_logprobs(
    model: PreTrainedModel | PeftModel, sequence: Sequence[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(log-probs in fp32 of shape (T, V), the tokens that came, shape (T,)), piece by piece through the KV cache."""
    ids = torch.tensor([list(sequence)], device=next(model.parameters()).device)
    cache = DynamicCache(config=model.config)
    for start in range(0, len(sequence) - 1, _PIECE_TOKENS):
        piece = ids[:, start : min(start + _PIECE_TOKENS, len(sequence) - 1)]
        logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0]
        yield logits.float().log_softmax(-1), ids[0, start + 1 : start + 1 + piece.shape[1]]


def _load(folder: Path, dtype: str) -> PreTrainedModel:
    with no_progress_bars():
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], local_files_only=True
        )
    model.to(device=default_device())  # pyright: ignore[reportCallIssue] transformers wraps the method, untyped
    return model.eval()
