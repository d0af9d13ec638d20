"""The built-in rollout engine: merged weights, prompts prefilled once a group, finished sequences dropped at once.

Legend: N prompts, G samples a prompt, A active sequences, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuneloop.data.chat import end_of_turn_id
from tuneloop.errors import UserError
from tuneloop.models.adapter_io import Adapter
from tuneloop.models.forward import head_weight, hidden_states, score
from tuneloop.models.load import load_model, load_tokenizer
from tuneloop.models.lora import LoraLinear
from tuneloop.models.packed import pack
from tuneloop.models.rounding import fold
from tuneloop.rng import uniforms
from tuneloop.rollout.engine import DEFAULT_ADAPTER, Completion, SampleStream
from tuneloop.rollout.kv_cache import Decode, GroupCache, Prefill
from tuneloop.rollout.sampler import draw
from tuneloop.settings import SamplingSettings

PREFILL_TOKENS = 32_768  # prompt tokens of one forward pass: bounds its activations whatever the prompts' lengths


@dataclass
class _Sequence:
    """One completion while it grows."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


class TorchEngine:
    """A `RolloutEngine` on a transformers model.

    Either owns a model loaded from a folder, or shares the trainer's (`TorchEngine.sharing`): the base weights are
    then held once, and only the adapted matrices have a second, merged copy.
    """

    def __init__(
        self,
        model_folder: Path,
        *,
        dtype: str = "bfloat16",
        max_sequences: int = 512,
        device: str | torch.device | None = None,
    ):
        model = load_model(model_folder, dtype, device)
        self._set_up(model, load_tokenizer(model_folder), max_sequences)

    @classmethod
    def sharing(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_sequences: int = 512
    ) -> "TorchEngine":
        """An engine over a model that somebody else trains."""
        engine = cls.__new__(cls)
        engine._set_up(model, tokenizer, max_sequences)
        return engine

    def _set_up(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_sequences: int) -> None:
        self.model, self.max_sequences = model, max_sequences
        self.end_ids = end_token_ids(model) | {end_of_turn_id(tokenizer)}
        self._adapters: dict[str, Adapter | None] = {}
        self._merged: dict[str, torch.Tensor] = {}  # of the adapter `_merged_name`
        self._merged_name = DEFAULT_ADAPTER

    def sync(self, adapter: Adapter | None, name: str = DEFAULT_ADAPTER) -> str:
        """Merge the adapter into copies of the matrices that it adapts; the base stays as it is.

        Raises:
            UserError: the adapter was made for another model.
        """
        self._adapters[name] = adapter
        self._merge(name)
        return adapter.digest() if adapter else ""

    @torch.no_grad()
    def _merge(self, name: str) -> None:
        adapter = self._adapters.get(name)
        factors = adapter.factors if adapter else {}
        self._merged_name = name
        self._merged = {module: tensor for module, tensor in self._merged.items() if module in factors}
        for module, (a, b) in factors.items():
            weight = _linear(self.model, module).weight
            if (b.shape[0], a.shape[1]) != tuple(weight.shape):
                raise UserError(f"the adapter was made for another base: {module} has another shape")
            # From zero: a matrix that were left as it was before would pass for the new one for many updates.
            merged = self._merged[module].zero_() if module in self._merged else torch.zeros_like(weight)
            fold(weight, a, b, adapter.scaling(module), merged)  # type: ignore[union-attr]
            self._merged[module] = merged

    def sleep(self) -> None:
        """The weights are the trainer's: there is nothing to give back."""

    def wake(self) -> None:
        """Always awake."""

    def close(self) -> None:
        """Forget the merged matrices."""
        self._merged, self._adapters = {}, {}

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int,
        sampling: SamplingSettings,
        max_new_tokens: int,
        stream: SampleStream,
        adapter: str = DEFAULT_ADAPTER,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        indices = stream.prompt_indices if stream.prompt_indices is not None else range(len(prompts))
        names = np.asarray(indices, dtype=np.uint64)
        results: list[list[Completion]] = []
        with self._weights(adapter):
            for part in _parts(prompts, max(1, self.max_sequences // samples)):
                batch = _Batch(self, prompts[part], samples, sampling, stream, names[part])
                results.extend(batch.run(max_new_tokens))
        return results

    @torch.no_grad()
    def logprobs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: str = DEFAULT_ADAPTER
    ) -> list[list[float]]:
        """See `RolloutEngine.logprobs`."""
        batch = pack([(prompt, [completion]) for prompt, completion in pairs], self.model.device)
        with self._weights(adapter):
            logprobs_S = score(self.model, batch).logprobs_S
        return [part.tolist() for part in logprobs_S.split([len(completion) for _, completion in pairs])]

    @contextmanager
    def _weights(self, adapter: str) -> Iterator[None]:
        """Compute with the merged matrices instead of base + adapter, then put everything back."""
        if adapter != self._merged_name:
            self._merge(adapter)
        lora = [module for module in self.model.modules() if isinstance(module, LoraLinear)]
        was_enabled = [layer.enabled for layer in lora]
        linears = {name: _linear(self.model, name) for name in self._merged}
        originals = {name: linear.weight.data for name, linear in linears.items()}
        was_training = self.model.training
        try:
            self.model.eval()
            for layer in lora:
                layer.enabled = False
            for name, linear in linears.items():
                linear.weight.data = self._merged[name]
            yield
        finally:
            for name, linear in linears.items():
                linear.weight.data = originals[name]
            for layer, enabled in zip(lora, was_enabled, strict=True):
                layer.enabled = enabled
            self.model.train(was_training)


class _Batch:
    """The sequences of one generate call that run together."""

    def __init__(self, engine, prompts, samples, sampling, stream, names):
        self.engine, self.sampling, self.stream, self.names = engine, sampling, stream, names
        self.prompts, self.samples = prompts, samples
        self.device = engine.model.device
        self.sequences = [[_Sequence() for _ in range(samples)] for _ in prompts]

    def run(self, max_new_tokens: int) -> list[list[Completion]]:
        model, cache = self.engine.model, GroupCache(self.samples)
        batch = pack([(prompt, []) for prompt in self.prompts], self.device)
        hidden_TD = hidden_states(model, batch.input_ids_T, batch.position_ids_T, Prefill(cache, batch))
        hidden_ND = hidden_TD[batch.prompt_length_N.cumsum(0) - 1]
        # Which prompt of the call, which sample, and which row of the cache each active sequence is.
        prompt_A, sample_A = (axis.flatten() for axis in np.indices((len(self.prompts), self.samples)))
        cached = np.arange(len(self.prompts))  # call's prompts in the cache, in the cache's order
        row_A = prompt_A
        token_A = self._draw(hidden_ND, row_A, prompt_A, sample_A, 0)
        lengths_N = batch.prompt_length_N.cpu().numpy()
        for place in range(1, max_new_tokens):
            going = np.array(
                [not self.sequences[p][s].finished for p, s in zip(prompt_A, sample_A, strict=True)], dtype=bool
            )
            prompt_A, sample_A, token_A = prompt_A[going], sample_A[going], token_A[going]
            if not prompt_A.size:
                break
            alive = np.unique(prompt_A)
            if 2 * alive.size <= cached.size:
                cache.keep(torch.from_numpy(np.searchsorted(cached, alive)).to(self.device))
                cached = alive
            row_A = np.searchsorted(cached, prompt_A)
            step = Decode(cache, self._tensor(row_A), self._tensor(sample_A), place - 1)
            positions = self._tensor(lengths_N[prompt_A] + place - 1)
            hidden_AD = hidden_states(model, self._tensor(token_A), positions, step)
            token_A = self._draw(hidden_AD, np.arange(prompt_A.size), prompt_A, sample_A, place)
        return [[Completion(s.token_ids, s.logprobs, s.finished) for s in group] for group in self.sequences]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)

    def _draw(self, hidden_RD, row_A, prompt_A, sample_A, place: int) -> np.ndarray:
        counters = np.stack(
            [np.full(len(prompt_A), self.stream.round), self.names[prompt_A], sample_A, np.full(len(prompt_A), place)],
            axis=1,
        ).astype(np.uint64)
        uniform_A = torch.from_numpy(uniforms(self.stream.seed, counters))
        logits_RV = F.linear(hidden_RD, head_weight(self.engine.model))
        tokens, logprobs = draw(logits_RV, self._tensor(row_A), uniform_A.to(self.device), self.sampling)
        token_A = tokens.cpu().numpy()
        for p, s, token, logprob in zip(prompt_A, sample_A, token_A.tolist(), logprobs.tolist(), strict=True):
            sequence = self.sequences[p][s]
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.finished = token in self.engine.end_ids
        return token_A


def _parts(prompts: Sequence[Sequence[int]], at_once: int) -> Iterator[slice]:
    """Slices of at most `at_once` prompts and, beyond the first prompt, `PREFILL_TOKENS` tokens."""
    first, tokens = 0, 0
    for index, prompt in enumerate(prompts):
        if index > first and (index - first == at_once or tokens + len(prompt) > PREFILL_TOKENS):
            yield slice(first, index)
            first, tokens = index, 0
        tokens += len(prompt)
    if first < len(prompts):
        yield slice(first, len(prompts))


def end_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a completion, from the generation config or the model's; may be empty."""
    for config in (model.generation_config, model.config):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"the adapter was made for another base: the model has no module {name}") from None
    module = module.base if isinstance(module, LoraLinear) else module
    if not isinstance(module, nn.Linear):
        raise UserError(f"the adapter was made for another base: {name} is no linear layer")
    return module
