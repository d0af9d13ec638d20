"""One engine for several training processes: tensor parallelism over the GPUs that each of them trains on."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from tuneloop.memory import release_gpu_memory
from tuneloop.models.adapter_io import Adapter
from tuneloop.rollout.engine import DEFAULT_ADAPTER, Completion, RolloutEngine, SampleStream
from tuneloop.settings import SamplingSettings
from tuneloop.world import World

T = TypeVar("T")


class LedEngine:
    """A `RolloutEngine` whose every call is made by all processes together; the first of each block has the engine.

    Args:
        engine: the block's, in its first process; None in the others.
        size: processes of a block.
    """

    def __init__(self, engine: RolloutEngine | None, world: World, size: int):
        self.engine, self.world = engine, world
        self._leader = world.rank - world.rank % size
        self._block = range(self._leader, self._leader + size)

    def sync(self, adapter: Adapter | None, name: str = DEFAULT_ADAPTER) -> str:
        """See `RolloutEngine.sync`; all processes hold the same adapter."""
        return self._led(lambda engine: engine.sync(adapter, name))

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
        """See `RolloutEngine.generate`; each process asks for its own prompts."""
        names = list(stream.prompt_indices if stream.prompt_indices is not None else range(len(prompts)))
        asked = self.world.gather(([list(prompt) for prompt in prompts], names))

        def run(engine: RolloutEngine) -> list[list[list[Completion]]]:
            together = [prompt for rank in self._block for prompt in asked[rank][0]]
            indices = [name for rank in self._block for name in asked[rank][1]]
            made = iter(
                engine.generate(
                    together,
                    samples=samples,
                    sampling=sampling,
                    max_new_tokens=max_new_tokens,
                    stream=SampleStream(stream.seed, stream.round, indices),
                    adapter=adapter,
                )
            )
            return [[next(made) for _ in asked[rank][0]] for rank in self._block]

        return self._led(run)[self.world.rank - self._leader]

    def logprobs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: str = DEFAULT_ADAPTER
    ) -> list[list[float]]:
        """See `RolloutEngine.logprobs`; all processes ask for the same."""
        return self._led(lambda engine: engine.logprobs(pairs, adapter))

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        self._led(lambda engine: engine.sleep())

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        release_gpu_memory()
        self.world.gather(None)  # its weights come back to the GPUs of all
        self._led(lambda engine: engine.wake())

    def close(self) -> None:
        """End the engine; alone, since it is called when a process fails too."""
        if self.engine:
            self.engine.close()

    def _led(self, action: Callable[[RolloutEngine], T]) -> T:
        """What `action` gives on the block's engine, in every process of the block; so do its errors."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.engine:
            try:
                outcome = action(self.engine), None
            except Exception as error:
                outcome = None, error
        outcomes = self.world.gather(outcome)
        for _, error in outcomes:
            if error:
                raise error  # everywhere: nobody waits for those who failed
        return outcomes[self._leader][0]  # type: ignore[return-value]
