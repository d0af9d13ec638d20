"""Small networks on the policy's hidden states that some algorithms train beside the adapter; they are not published.

They read detached hidden states in fp32: the adapter is moved by the policy's own loss alone.

Legend: T packed tokens, D hidden size, N prompts, B completions, S scored tokens.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from tuneloop.models.forward import score_with_hidden
from tuneloop.models.logprobs import TokenScores
from tuneloop.models.packed import PackedBatch


def _perceptron(size: int, layers: int) -> nn.Sequential:
    """Linear-GELU-LayerNorm `layers` - 1 times, and a Linear to 1 that starts at zero."""
    blocks = [nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size)) for _ in range(layers - 1)]
    last = nn.Linear(size, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*blocks, last)


class ValueHead(nn.Module):
    """PPO's estimate of the reward to come, at every position that predicts a token; a 2-layer perceptron."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.net = _perceptron(hidden_size, layers=2)

    def forward(self, hidden_TD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """Values, shape (S,)."""
        return self.net(hidden_TD)[batch.row_S, 0]


class PartitionHead(nn.Module):
    """FlowRL's log Z: a 3-layer perceptron on the mean hidden state of the prompt (arXiv:2509.15207)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.net = _perceptron(hidden_size, layers=3)

    def forward(self, hidden_TD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """log Z of each completion's prompt, shape (B,)."""
        lengths_N = batch.prompt_length_N
        mean_ND = torch.segment_reduce(hidden_TD[: batch.prompt_tokens], "mean", lengths=lengths_N)
        # A completion's first token is predicted by the last row of its prompt.
        prompt_of_B = torch.searchsorted(lengths_N.cumsum(0), batch.row_S[batch.shared_S], right=True)
        return self.net(mean_ND)[prompt_of_B, 0]


HEADS: dict[str, type[nn.Module]] = {"values_S": ValueHead, "log_z_B": PartitionHead}  # by their LossInputs field


def make_heads(names: Sequence[str], model: PreTrainedModel, seed: int) -> nn.ModuleDict:
    """Heads that depend on (names, model's hidden size, seed) alone, in fp32 on the model's device.

    Args:
        names: of `HEADS`.
    """
    size = model.get_output_embeddings().weight.shape[1]  # type: ignore[union-attr]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = nn.ModuleDict({name: HEADS[name](size) for name in names})
    return heads.to(model.device)


def score_with_heads(
    model: PreTrainedModel, heads: nn.ModuleDict, batch: PackedBatch, temperature: float
) -> tuple[TokenScores, dict[str, torch.Tensor]]:
    """Log-probs and entropies of the batch's scored tokens, and every head's estimates by its name."""
    scores, hidden_TD = score_with_hidden(model, batch, temperature)
    if not heads:
        return scores, {}
    hidden_TD = hidden_TD.detach().float()
    return scores, {name: head(hidden_TD, batch) for name, head in heads.items()}
