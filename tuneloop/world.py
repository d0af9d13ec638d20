"""The processes that train one adapter together; one process is a world of its own.

Every process holds the same adapter and computes its share of the prompts. What is decided for all (advantages, whether
to stop, what is written) is decided from gathered values, so that every process decides the same.
"""

import os
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class World:
    """This process's place among `size` processes, and the few exchanges that training needs.

    Uses torch.distributed's default group when it is initialised.

    Attributes:
        together: whether there is such a group; it may be of one process.
        local_rank, local_size: this process's place among those of its machine, and how many they are.
    """

    def __init__(self) -> None:
        self.together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if self.together else 0
        self.size = torch.distributed.get_world_size() if self.together else 1
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank)) if self.together else 0
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.together else 1

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

    def from_first(self, value: T | None) -> T | None:
        """The first process's value, in every process."""
        if self.size == 1:
            return value
        values = [value if self.is_first else None]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def tensors_from_first(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The first process's tensors in host memory, in every process; each passes through the GPUs by itself."""
        if self.size == 1:
            return tensors
        shapes = self.from_first({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        received = {}
        for name, (shape, dtype) in (shapes or {}).items():
            whole = tensors[name].contiguous() if self.is_first else torch.empty(shape, dtype=dtype)
            moved = whole.to(device)
            torch.distributed.broadcast(moved, src=0)
            received[name] = moved.to("cpu")
        return received

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
