"""Advantages against arithmetic done by hand, overlong shaping, and which prompts dynamic sampling takes.

Two prompts with two completions each: rewards 1, 0 and 1, 1; lengths 2, 1 and 1, 2, so six tokens in all.
"""

import math

import pytest
import torch

from tuneloop.algorithms.advantages import grpo_advantages
from tuneloop.algorithms.dapo import overlong_penalty
from tuneloop.algorithms.ppo import generalised_advantages
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.table import ALGORITHMS
from tuneloop.algorithms.types import AdvantageInputs
from tuneloop.data.schema import Example
from tuneloop.rewards.base import Score
from tuneloop.rollout.engine import Completion
from tuneloop.training.collect import Rollout, RolloutGroup
from tuneloop.training.data_order import rows_of_update
from tuneloop.training.dynamic_sampling import collect_with_spread, has_spread

REWARDS = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
LENGTHS = torch.tensor([[2, 1], [1, 2]])
PENALTY = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.1, 0.0])  # KL a token, coefficient included


def advantages(name: str, **more) -> list[float]:
    settings = AlgorithmSettings(name=name)
    return ALGORITHMS[name].advantages(AdvantageInputs(REWARDS, LENGTHS, **more), settings).advantages_W.tolist()


def test_grpo_by_hand():
    # Group [1, 0, 0, 1]: mean 1/2, sample variance (4 x 1/4) / 3 = 1/3, std 0.577350; 0.5 / 0.577351 = 0.866024.
    # Group [1, 1, 1, 1]: no spread, so exactly zero.
    found = grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    torch.testing.assert_close(found[0], torch.tensor([expected, -expected, -expected, expected]))
    assert found[1].tolist() == [0.0, 0.0, 0.0, 0.0]


def test_group_of_equal_rewards_has_no_advantage_whatever_rounding_does():
    # 0.1 is not exact in binary: the mean of seven of them need not be 0.1 again.
    assert not grpo_advantages(torch.full((1, 7), 0.1)).any()


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "flowrl"])
def test_group_normalised_advantages_reach_every_token(name: str):
    # 1 and 0: mean 1/2, sample std sqrt(1/2) = 0.707107; 0.5 / 0.707108 = 0.707106.
    a = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert advantages(name) == pytest.approx([a, a, -a, 0.0, 0.0, 0.0])


def test_dr_grpo_by_hand():
    assert advantages("dr_grpo") == pytest.approx([0.5, 0.5, -0.5, 0.0, 0.0, 0.0])


def test_rloo_by_hand():
    # The other's reward: 1 - 0, 0 - 1, 1 - 1, 1 - 1.
    assert advantages("rloo") == pytest.approx([1.0, 1.0, -1.0, 0.0, 0.0, 0.0])


def test_rloo_of_three_by_hand():
    # Rewards 1, 0.5, 0: 1 - 0.25, 0.5 - 0.5, 0 - 0.75.
    inputs = AdvantageInputs(torch.tensor([[1.0, 0.5, 0.0]]), torch.ones(1, 3, dtype=torch.long))
    found = ALGORITHMS["rloo"].advantages(inputs, AlgorithmSettings(name="rloo")).advantages_W
    assert found.tolist() == pytest.approx([0.75, 0.0, -0.75])


def test_reinforce_is_the_reward_to_go():
    assert advantages("reinforce") == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    # Less the penalties of the token and of what follows: 1 - 0.3, 1 - 0.2; 0 - 0.3; 1 - 0; 1 - 0.1, 1 - 0.
    assert advantages("reinforce", penalty_W=PENALTY) == pytest.approx([0.7, 0.8, -0.3, 1.0, 0.9, 1.0])


def test_reinforce_pp_by_hand():
    # Tokens 1, 1, 0, 1, 1, 1: mean 5/6, sample variance (5 (1/6)^2 + (5/6)^2) / 5 = 1/6, std 0.408248.
    # (1 - 5/6) / 0.408249 = 0.408247; (0 - 5/6) / 0.408249 = -2.041236.
    high, low = (1 / 6) / (math.sqrt(1 / 6) + 1e-6), (-5 / 6) / (math.sqrt(1 / 6) + 1e-6)
    assert advantages("reinforce_pp") == pytest.approx([high, high, low, high, high, high], rel=1e-5)


def test_reinforce_pp_baseline_by_hand():
    # Centred by group: 1/2, -1/2, 0, 0; sample std over completions sqrt((1/4 + 1/4) / 3) = 0.408248.
    a = 0.5 / (math.sqrt(1 / 6) + 1e-6)
    assert advantages("reinforce_pp_baseline") == pytest.approx([a, a, -a, 0.0, 0.0, 0.0], rel=1e-5)


def test_batch_without_any_spread_has_no_advantage():
    inputs = AdvantageInputs(torch.full((2, 2), 0.1), LENGTHS)
    for name in ("reinforce_pp", "reinforce_pp_baseline"):
        assert not ALGORITHMS[name].advantages(inputs, AlgorithmSettings(name=name)).advantages_W.any()


def test_kl_in_the_reward_lowers_a_completions_reward():
    # 1 - 0.3 = 0.7 and 0 - 0.3 = -0.3; 1 - 0 = 1 and 1 - 0.1 = 0.9: centred 0.5, -0.5; 0.05, -0.05.
    assert advantages("dr_grpo", penalty_W=PENALTY) == pytest.approx([0.5, 0.5, -0.5, 0.05, -0.05, -0.05])


def test_generalised_advantages_by_hand():
    # gamma 0.9, lambda 0.5; completion 0: rewards 0, 1, values 0.4, 0.6; completion 1: reward 2, value 0.5.
    # d1 = 1 - 0.6 = 0.4; d0 = 0 + 0.9 x 0.6 - 0.4 = 0.14; A1 = 0.4; A0 = 0.14 + 0.45 x 0.4 = 0.32. 2 - 0.5 = 1.5.
    found = generalised_advantages(
        torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.4, 0.6, 0.5]), torch.tensor([2, 1]), gamma=0.9, lambda_=0.5
    )
    assert found.tolist() == pytest.approx([0.32, 0.4, 1.5])


def test_ppo_by_hand():
    # gamma = lambda = 1: the return is the reward to go, the advantage return - value before normalisation.
    # With the penalties above: returns 0.7, 0.8, -0.3, 1.0, 0.9, 1.0; values 0.5 throughout.
    inputs = AdvantageInputs(REWARDS, LENGTHS, penalty_W=PENALTY, values_W=torch.full((6,), 0.5))
    found = ALGORITHMS["ppo"].advantages(inputs, AlgorithmSettings(name="ppo"))
    returns = torch.tensor([0.7, 0.8, -0.3, 1.0, 0.9, 1.0])
    torch.testing.assert_close(found.returns_W, returns)
    # Mean of 0.2, 0.3, -0.8, 0.5, 0.4, 0.5 is 1.1 / 6 = 0.183333; squares of the differences sum to
    # 0.000278 + 0.013611 + 0.966944 + 0.100278 + 0.046944 + 0.100278 = 1.228333; std sqrt(1.228333 / 5) = 0.495648.
    expected = [(x - 0.5 - 1.1 / 6) / (math.sqrt(1.228333 / 5) + 1e-6) for x in returns.tolist()]
    assert found.advantages_W.tolist() == pytest.approx(expected, rel=1e-4)
    assert found.metrics["value/explained_variance"] == pytest.approx(0.0, abs=1e-6)  # a constant explains nothing
    assert found.metrics["value/mean"] == pytest.approx(0.5)


def test_overlong_penalty_by_hand():
    # Limit 10, buffer 4: nothing up to 6 tokens, then a quarter a token, all at 10; times 0.5.
    settings = AlgorithmSettings(overlong_buffer=4, overlong_penalty=0.5)
    lengths = torch.tensor([[1, 6, 7, 9, 10]])
    assert overlong_penalty(lengths, 10, settings).tolist() == [[0.0, 0.0, 0.125, 0.375, 0.5]]
    assert not overlong_penalty(lengths, 10, AlgorithmSettings()).any()


# Dynamic sampling


class Sampler:
    """Groups of two; `solved` rows get equal rewards. Notes what it was asked for."""

    def __init__(self, solved):
        self.solved, self.rounds = solved, []

    def __call__(self, rows, names) -> Rollout:
        self.rounds.append((list(rows), list(names)))
        return Rollout([self._group(row, name) for row, name in zip(rows, names, strict=True)])

    def _group(self, row: int, name: int) -> RolloutGroup:
        rewards = (1.0, 1.0) if self.solved(row) else (1.0, 0.0)
        example = Example(id=str(row), messages=[{"role": "user", "content": str(name)}], answer="", completion="")
        completions = [Completion([1], [0.0], True) for _ in rewards]
        return RolloutGroup(example, [1], completions, ["", ""], [Score(x, {"exact": x}, "exact") for x in rewards])


def test_dynamic_sampling_fills_the_update_with_groups_that_have_spread():
    sampler = Sampler(solved=lambda row: row % 2 == 0)
    rollout = collect_with_spread(sampler, seed=7, update=3, wanted=8, rows=100, max_rounds=10)
    assert len(rollout.groups) == 8
    assert all(map(has_spread, rollout.groups))
    rows = [row for rows, _ in sampler.rounds for row in rows]
    names = [name for _, names in sampler.rounds for name in names]
    assert sampler.rounds[0][0] == rows_of_update(7, 3, 8, 100)  # the data's own order comes first
    assert len(set(rows)) == len(rows)  # no prompt twice
    assert names == list(range(len(names)))  # a name of its own for each
    assert len(rollout.groups) + len(rollout.discarded) == len(rows)
    kept = [int(group.example.messages[0]["content"]) for group in rollout.groups]
    assert kept == sorted(kept)


def test_dynamic_sampling_is_a_function_of_seed_and_update():
    def asked(seed: int, update: int) -> list:
        sampler = Sampler(solved=lambda row: row % 3 > 0)
        collect_with_spread(sampler, seed=seed, update=update, wanted=8, rows=100, max_rounds=4)
        return sampler.rounds

    assert asked(7, 3) == asked(7, 3)
    assert asked(7, 3)[1] != asked(7, 4)[1]
    assert asked(7, 3)[1] != asked(8, 3)[1]


@pytest.mark.parametrize(("rows", "max_rounds", "rounds"), [(100, 2, 3), (12, 9, 2)], ids=["rounds end", "data ends"])
def test_dynamic_sampling_ends_and_fills_up(rows: int, max_rounds: int, rounds: int):
    sampler = Sampler(solved=lambda row: row > 0)
    rollout = collect_with_spread(sampler, seed=7, update=0, wanted=8, rows=rows, max_rounds=max_rounds)
    assert len(sampler.rounds) == rounds
    assert len(rollout.groups) == 8


def test_dynamic_sampling_samples_nothing_more_when_all_have_spread():
    sampler = Sampler(solved=lambda row: False)
    rollout = collect_with_spread(sampler, seed=7, update=0, wanted=8, rows=100, max_rounds=4)
    assert (len(sampler.rounds), len(rollout.groups), rollout.discarded) == (1, 8, [])
