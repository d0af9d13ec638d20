"""Splitting work into micro-batches by a budget of packed tokens."""

from collections.abc import Sequence

from tuneloop.models.packed import Group


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
