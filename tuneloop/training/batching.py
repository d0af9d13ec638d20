"""Splitting work into micro-batches by a budget of packed tokens."""

from collections.abc import Callable, Sequence

from tuneloop.models.packed import Group
from tuneloop.training.balance import partition
from tuneloop.world import World


def packed_length(group: Group) -> int:
    """Packed rows of a group: its prompt once, and every completion but the last token."""
    prompt, completions = group
    return len(prompt) + sum(len(completion) - 1 for completion in completions)


def micro_batches(groups: Sequence[Group], budget: int) -> list[list[int]]:
    """Indices of the groups of each forward pass: similar lengths together, at most `budget` packed tokens each.

    A group that alone exceeds the budget gets a pass of its own.
    """
    order = sorted(range(len(groups)), key=lambda i: (packed_length(groups[i]), i))
    batches: list[list[int]] = []
    room = 0
    for index in order:
        length = packed_length(groups[index])
        if not batches or length > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= length
    return batches


def shared_out(groups: Sequence[Group], budget: int, cost: Callable[[Group], float], world: World) -> list[list[int]]:
    """Indices of the groups of each of this process's forward passes; all processes make equally many.

    The groups are parted by cost, first over the processes, then over each one's passes; the n-th passes of all
    processes are about alike, because sharded weights make them wait for each other. An empty pass has nothing to
    compute but must be made.

    Args:
        groups: the work of all processes, the same in each.
        budget: packed tokens of a pass; see `micro_batches`.
    """
    if world.size == 1:
        return micro_batches(groups, budget)
    costs = [cost(group) for group in groups]
    mine = partition(costs, world.size)[world.rank]
    passes = _balanced([groups[i] for i in mine], [costs[i] for i in mine], budget, 1)
    wanted = max(world.gather(len(passes)))
    if len(passes) < wanted:
        passes = _balanced([groups[i] for i in mine], [costs[i] for i in mine], budget, wanted)
    passes.sort(key=lambda indices: -sum(costs[mine[i]] for i in indices))
    return [[mine[i] for i in indices] for indices in passes] + [[] for _ in range(wanted - len(passes))]


def _balanced(groups: Sequence[Group], costs: Sequence[float], budget: int, at_least: int) -> list[list[int]]:
    """At least so many passes (one a group at most) of about equal cost, within the budget where a group allows it."""
    lengths = [packed_length(group) for group in groups]
    count = min(max(at_least, -(-sum(lengths) // budget)), len(groups))
    while count < len(groups):
        parts = partition(costs, count)
        if all(len(part) == 1 or sum(lengths[i] for i in part) <= budget for part in parts):
            return [part for part in parts if part]
        count += 1
    return [[index] for index in range(len(groups))]
