"""The seam between whoever needs completions and whatever makes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tuneloop.models.adapter_io import Adapter
from tuneloop.settings import SamplingSettings


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt.

    Attributes:
        token_ids: the new tokens, the end token included when the model produced one.
        logprobs: behaviour log-probs (nats), one a token, at the sampling temperature, before top-k and top-p.
        finished: the model ended it by itself; False means it was cut off at the limit.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


@dataclass(frozen=True)
class SampleStream:
    """Names the random numbers of one call: equal streams sample equal completions, whatever the batching.

    The number behind a token is a pure function of (seed, round, prompt, sample, position).
    """

    seed: int
    round: int  # the update, or another number that tells calls apart
    prompt_indices: Sequence[int] | None = None  # names of the prompts; None: their place in the call


class RolloutEngine(Protocol):
    """Samples completions from base + adapter.

    Contract: `sync` replaces the adapter that later calls use, and returns its digest as the engine holds it;
    `generate` returns `samples` completions for every prompt, in order, and is a pure function of the weights and the
    arguments; `logprobs` scores given tokens with the weights that `generate` would use.
    """

    def sync(self, adapter: Adapter | None) -> str:
        """Use this adapter from now on (None: the bare base); returns the digest of what the engine now holds."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int,
        sampling: SamplingSettings,
        max_new_tokens: int,
        stream: SampleStream,
    ) -> list[list[Completion]]:
        """Sample `samples` completions of every prompt."""
        ...

    def logprobs(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        """For every (prompt, completion), the log-probs (nats, temperature 1) of the completion's tokens."""
        ...
