"""The processes that train one adapter together; one process is a world of its own.

Every process holds the same adapter and computes its share of the prompts. What is decided for all (advantages, whether
to stop, what is written) is decided from gathered values, so that every process decides the same.
"""

from typing import Any, TypeVar

import torch

T = TypeVar("T")


class World:
    """This process's place among `size` processes, and the few exchanges that training needs.

    Uses torch.distributed's default group when it is initialised.

    Attributes:
        together: whether there is such a group; it may be of one process.
    """

    def __init__(self) -> None:
        self.together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if self.together else 0
        self.size = torch.distributed.get_world_size() if self.together else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every process's value, in rank order, in every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def sum(self, values: dict[str, float]) -> dict[str, float]:
        """Sums over the processes; a name that only some have counts as 0 in the others."""
        parts = self.gather(dict(values))
        names = dict.fromkeys(name for part in parts for name in part)
        return {name: sum(part.get(name, 0.0) for part in parts) for name in names}

    def any(self, value: bool) -> bool:
        """Whether any process says so."""
        return any(self.gather(value))

    def share(self, count: int) -> range:
        """Which of `count` equal pieces of work are this process's: every `size`-th."""
        return range(self.rank, count, self.size)

    def interleave(self, mine: list[T]) -> list[T]:
        """Results of all processes' `share`s, in the order of the work."""
        parts = self.gather(mine)
        return [parts[i % self.size][i // self.size] for i in range(sum(len(part) for part in parts))]
