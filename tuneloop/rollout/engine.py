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


DEFAULT_ADAPTER = "policy"


class RolloutEngine(Protocol):
    """Samples completions from base + one of several named adapters.

    Contract: `sync` replaces the adapter that later calls with that name use, and returns its digest as the engine
    holds it; `generate` returns `samples` completions for every prompt, in order, and is a pure function of the weights
    and the arguments; `logprobs` scores given tokens with the weights that `generate` would use. `sleep` gives
    accelerator memory back until `wake`; both do nothing on an engine that has none of its own.
    """

    def sync(self, adapter: Adapter | None, name: str = DEFAULT_ADAPTER) -> str:
        """Use this adapter under `name` from now on (None: the bare base); returns the digest that is now held."""
        ...

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
        """Sample `samples` completions of every prompt."""
        ...

    def logprobs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: str = DEFAULT_ADAPTER
    ) -> list[list[float]]:
        """For every (prompt, completion), the log-probs (nats, temperature 1) of the completion's tokens."""
        ...

    def sleep(self) -> None:
        """Give accelerator memory back while the trainer works."""
        ...

    def wake(self) -> None:
        """Be ready to generate again."""
        ...

    def close(self) -> None:
        """End the engine's processes and give its memory back."""
        ...
