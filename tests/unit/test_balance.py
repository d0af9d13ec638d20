"""Parting work over processes and forward passes."""

from itertools import product
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloop.models.packed import Group
from tuneloop.training.balance import GroupCost, partition
from tuneloop.training.batching import micro_batches, packed_length, shared_out
from tuneloop.world import World


def totals(costs, parts):
    return [sum(costs[i] for i in part) for part in parts]


def test_partition_by_hand():
    """8, 7, 6, 5, 4: the two largest are replaced by their difference, 8 - 7 = 1, 6 - 5 = 1, 4 - 1 = 3, 3 - 1 = 2. So
    the parts differ by 2: 14 and 16 of 30. (The best is 15 and 15.)"""
    parts = partition([8, 7, 6, 5, 4], 2)
    assert sorted(totals([8, 7, 6, 5, 4], parts)) == [14, 16]
    assert sorted(index for part in parts for index in part) == [0, 1, 2, 3, 4]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 5))
def test_partition_has_everything_once_and_no_part_can_give_its_smallest_piece_away(costs, count):
    parts = partition(costs, count)
    assert len(parts) == count
    assert sorted(index for part in parts for index in part) == list(range(len(costs)))
    assert all(part == sorted(part) for part in parts)
    sums = totals(costs, parts)
    assert max(sums) - min(sums) <= max(costs, default=0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_partition_in_two_is_near_the_best(costs):
    """The differencing method's worst case in two parts is 7/6 of the best (Fischetti & Martello, 1987)."""
    best = min(
        max(sum(c for c, side in zip(costs, sides, strict=True) if side == half) for half in (0, 1))
        for sides in product((0, 1), repeat=len(costs))
    )
    assert max(totals(costs, partition(costs, 2))) <= 7 / 6 * best + 1e-9


def group(prompt: int, *completions: int) -> Group:
    return [5] * prompt, [[6] * length for length in completions]


def test_cost_of_a_7b():
    """12 d^2 weights a layer over 2 d: 6 d = 24576 for d = 4096. A prompt of 10 with one completion of 4 feeds 13
    tokens; attention is 10^2 + 3 (10 + 3) = 139."""
    cost = GroupCost.of(SimpleNamespace(hidden_size=4096))
    assert cost(group(10, 4)) == 24576 * 13 + 139
    assert cost(group(10, 4, 4)) == 24576 * 16 + 178  # the prompt is computed once


def test_cost_by_the_models_own_sizes():
    """Qwen2.5-7B: q and o 2 x 3584 x 3584, k and v 2 x 3584 x 512, MLP 3 x 3584 x 18944, over 2 x 3584."""
    config = SimpleNamespace(
        hidden_size=3584, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944, head_dim=None
    )
    assert GroupCost.of(config).linear == 3584 + 512 + 1.5 * 18944


class FakeWorld(World):
    """One of several processes, whose exchanges are answered by computing the others' part as well."""

    def __init__(self, rank: int, size: int, numbers: list[int]):
        super().__init__()
        self.rank, self.size, self.numbers = rank, size, numbers

    def gather(self, value):
        return [value, *self.numbers]


def shares(groups: list[Group], budget: int, size: int) -> list[list[list[int]]]:
    """Every process's passes: the first round finds how many each would make."""
    cost = GroupCost(10.0)
    alone = [len(shared_out(groups, budget, cost, FakeWorld(rank, size, []))) for rank in range(size)]
    return [shared_out(groups, budget, cost, FakeWorld(rank, size, alone)) for rank in range(size)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), max_size=10), st.integers(8, 60), st.integers(2, 4))
def test_passes_are_equally_many_hold_everything_once_and_keep_the_budget(lengths, budget, size):
    groups = [group(prompt, completion) for prompt, completion in lengths]
    passes = shares(groups, budget, size)
    assert len({len(mine) for mine in passes}) == 1
    members = [indices for mine in passes for indices in mine]
    assert sorted(index for indices in members for index in indices) == list(range(len(groups)))
    for indices in members:
        assert len(indices) <= 1 or sum(packed_length(groups[i]) for i in indices) <= budget


def test_a_process_with_few_long_groups_makes_empty_passes():
    """One group of 101 tokens against twelve of 11 tokens each, at most 11 a pass."""
    passes = shares([group(100, 2), *[group(10, 2)] * 12], 11, 2)
    assert len(passes[0]) == len(passes[1])
    assert any(not indices for mine in passes for indices in mine)
    assert all(mine[0] for mine in passes)  # empty ones come last


def test_the_nth_passes_of_two_processes_cost_about_the_same():
    groups = [group(length, 4) for length in (40, 38, 21, 19, 11, 9, 5, 4)]
    cost = GroupCost(10.0)
    mine, theirs = shares(groups, 45, 2)
    for ours, others in zip(mine, theirs, strict=True):
        pair = [sum(cost(groups[i]) for i in indices) for indices in (ours, others)]
        assert max(pair) <= 1.35 * min(pair)


def test_alone_similar_lengths_go_together():
    groups = [group(length, 2) for length in (30, 3, 29, 4)]
    assert shared_out(groups, 64, GroupCost(1.0), World()) == micro_batches(groups, 64)


@pytest.mark.parametrize("size", [2, 3])
def test_no_groups_no_passes(size: int):
    assert shares([], 8, size) == [[]] * size
