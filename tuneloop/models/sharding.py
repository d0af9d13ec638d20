"""Models whose weights are spread over processes: each holds a part, and a layer is put together while it computes.

Nothing here knows who spreads them; `tuneloop.training.zero` does, by DeepSpeed's ZeRO stage 3. A model that is not
spread runs straight through.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import nn

from tuneloop.models.logprobs import token_scores

T = TypeVar("T")
_ATTRIBUTE = "tuneloop_sharding"


class TokenScorer(nn.Module):
    """`token_scores` with a model's output head, as a module: hooks on modules then see when the head is needed."""

    def __init__(self, head: nn.Module | None):
        super().__init__()
        assert head is not None, "a causal language model has an output head"
        self._head = [head]  # in a list: the head stays the model's own submodule

    @property
    def weight(self) -> nn.Parameter:
        """The head's weight (V, D)."""
        return self._head[0].weight  # type: ignore[return-value]

    def forward(
        self,
        hidden_TD: torch.Tensor,
        row_S: torch.Tensor,
        target_S: torch.Tensor,
        temperature: float,
        shared_rows: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies, shape (S,) each; see `token_scores`."""
        scores = token_scores(hidden_TD, self.weight, row_S, target_S, temperature=temperature, shared_rows=shared_rows)
        return scores.logprobs_S, scores.entropy_S


class Sharding(Protocol):
    """What computes with a model whose weights are spread.

    Attributes:
        scorer: gets the head's weight while it runs.
    """

    scorer: TokenScorer

    def run(self, forward: Callable[[], T]) -> T:
        """A forward pass; every process runs as many as every other, in the same order."""
        ...


def set_sharding(model: nn.Module, sharding: Sharding | None) -> None:
    """Say that the model's weights are spread (or, with None, whole again)."""
    setattr(model, _ATTRIBUTE, sharding)


def sharding_of(model: nn.Module) -> Sharding | None:
    """How the model's weights are spread; None when they are whole."""
    return getattr(model, _ATTRIBUTE, None)


class GatherMeter:
    """Bytes of spread parameters that are put together by `whole`: now, and the most at once since `reset`."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def reset(self) -> None:
        """Start measuring again."""
        self.peak = self.now

    def add(self, size: int) -> None:
        """Note `size` bytes more (or less)."""
        self.now += size
        self.peak = max(self.peak, self.now)


METER = GatherMeter()


@contextmanager
def whole(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """The parameters with all their elements while inside; all processes enter together.

    Changes are lost: use the optimiser's `load_state` to change them. Parameters that are not spread are whole already.
    """
    spread = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not spread:
        yield
        return
    import deepspeed

    gathered = sum(p.ds_numel * p.element_size() for p in spread if not p.numel())  # type: ignore[attr-defined]
    METER.add(gathered)
    try:
        with deepspeed.zero.GatheredParameters(spread):
            yield
    finally:
        METER.add(-gathered)
