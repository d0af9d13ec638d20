"""Losses, advantages and KL estimators against arithmetic done by hand."""

import math

import pytest
import torch

from tuneloop.algorithms.advantages import grpo_advantages
from tuneloop.algorithms.correction import truncated_importance
from tuneloop.algorithms.grpo import grpo_loss
from tuneloop.algorithms.kl import kl_estimate
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import LossInputs


def test_grpo_advantages_by_hand():
    # Group [1, 0, 0, 1]: mean 1/2, sample variance (4 x 1/4) / 3 = 1/3, std 0.577350; 0.5 / 0.577351 = 0.866024.
    # Group [1, 1, 1, 1]: no spread, so exactly zero.
    advantages = grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-6)
    torch.testing.assert_close(advantages[0], torch.tensor([expected, -expected, -expected, expected]))
    assert advantages[1].tolist() == [0.0, 0.0, 0.0, 0.0]


def test_a_group_of_equal_rewards_has_no_advantage_whatever_rounding_does():
    # 0.1 is not exact in binary: the mean of seven of them need not be 0.1 again.
    assert not grpo_advantages(torch.full((1, 7), 0.1)).any()


def inputs(logprobs, old, behaviour, advantages, owner, reference=None) -> LossInputs:
    lengths = torch.bincount(torch.tensor(owner))
    return LossInputs(
        logprobs_S=torch.tensor(logprobs, requires_grad=True),
        old_logprobs_S=torch.tensor(old),
        behaviour_logprobs_S=torch.tensor(behaviour),
        reference_logprobs_S=None if reference is None else torch.tensor(reference),
        advantages_B=torch.tensor(advantages),
        completion_of_S=torch.tensor(owner),
        lengths_B=lengths,
        token_total=len(owner),
        completion_total=len(lengths),
    )


def test_clipped_surrogate_by_hand():
    # Completion 0 (A = 2): tokens with ratios 1.5 and 0.9. Completion 1 (A = -1): a token with ratio 0.5.
    # clip to [0.8, 1.2]:  min(1.5 x 2, 1.2 x 2) = 2.4 (stopped);  min(0.9 x 2, 0.9 x 2) = 1.8;
    #                      min(0.5 x -1, 0.8 x -1) = -0.8 (stopped).
    # token mean: -(2.4 + 1.8 - 0.8) / 3 = -1.133333
    old = [-1.0, -1.0, -1.0]
    new = [-1.0 + math.log(1.5), -1.0 + math.log(0.9), -1.0 + math.log(0.5)]
    outputs = grpo_loss(inputs(new, old, old, [2.0, -1.0], [0, 0, 1]), AlgorithmSettings())
    assert outputs.loss.item() == pytest.approx(-3.4 / 3, rel=1e-5)
    assert outputs.sums["clip"] == 2


def test_sequence_mean_by_hand():
    # The same three tokens: -( (2.4 + 1.8) / 2 + (-0.8) / 1 ) / 2 = -(2.1 - 0.8) / 2 = -0.65
    old = [-1.0, -1.0, -1.0]
    new = [-1.0 + math.log(1.5), -1.0 + math.log(0.9), -1.0 + math.log(0.5)]
    outputs = grpo_loss(inputs(new, old, old, [2.0, -1.0], [0, 0, 1]), AlgorithmSettings(aggregation="sequence_mean"))
    assert outputs.loss.item() == pytest.approx(-0.65, rel=1e-5)


def test_gradient_on_policy_is_that_of_reinforce():
    # At ratio 1 the surrogate's gradient with respect to log p is -A / tokens: A = 3 over two tokens gives -1.5 each.
    batch = inputs([-0.3, -0.7], [-0.3, -0.7], [-0.3, -0.7], [3.0], [0, 0])
    grpo_loss(batch, AlgorithmSettings()).loss.backward()
    torch.testing.assert_close(batch.logprobs_S.grad, torch.tensor([-1.5, -1.5]))


def test_clipped_tokens_have_no_gradient():
    batch = inputs([-1.0 + math.log(1.5)], [-1.0], [-1.0], [1.0], [0])
    grpo_loss(batch, AlgorithmSettings()).loss.backward()
    assert batch.logprobs_S.grad.tolist() == [0.0]


def test_truncated_importance_weights_by_hand():
    # trainer - engine: log 3 -> 3, cut to 2; log 0.5 -> 0.5.
    weights = truncated_importance(torch.tensor([math.log(3.0), math.log(0.5)]), torch.zeros(2), cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.5]))
    assert truncated_importance(torch.tensor([9.0]), torch.zeros(1), cap=0.0).tolist() == [1.0]


def test_importance_weight_scales_the_loss():
    # ratio 1, A = 1, engine log-prob lower by log 1.5: weight 1.5, loss -1.5.
    outputs = grpo_loss(inputs([-1.0], [-1.0], [-1.0 - math.log(1.5)], [1.0], [0]), AlgorithmSettings())
    assert outputs.loss.item() == pytest.approx(-1.5, rel=1e-5)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # log r = log q - log p = log(0.4 / 0.5) = -0.223144, r = 0.8
        ("k1", 0.223144),
        ("k2", 0.024896),  # 0.223144^2 / 2
        ("k3", 0.023144),  # 0.8 - 1 + 0.223144
    ],
)
def test_kl_estimators_by_hand(estimator: str, expected: float):
    value = kl_estimate(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.4)]), estimator)
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_are_unbiased(estimator: str):
    # Over the whole distribution, not over samples: sum p(x) k(x) must be KL(p || q) exactly.
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), estimator)).sum(), exact)


def test_kl_enters_the_loss_with_its_coefficient():
    # A = 0, so only KL is left: 0.5 x k3 of the row above = 0.5 x 0.023144.
    settings = AlgorithmSettings(kl_coefficient=0.5, kl_estimator="k3")
    batch = inputs([math.log(0.5)], [math.log(0.5)], [math.log(0.5)], [0.0], [0], reference=[math.log(0.4)])
    assert grpo_loss(batch, settings).loss.item() == pytest.approx(0.5 * 0.023144, abs=1e-6)


def test_micro_batches_add_up_to_the_minibatch():
    whole = inputs([-1.0, -2.0, -0.5], [-1.1, -1.8, -0.5], [-1.0, -2.0, -0.4], [1.0, -0.5], [0, 0, 1])
    parts = [
        inputs([-1.0, -2.0], [-1.1, -1.8], [-1.0, -2.0], [1.0], [0, 0]),
        inputs([-0.5], [-0.5], [-0.4], [-0.5], [0]),
    ]
    for aggregation in ("token_mean", "sequence_mean"):
        settings = AlgorithmSettings(aggregation=aggregation)
        pieces = [
            grpo_loss(LossInputs(**{**vars(part), "token_total": 3, "completion_total": 2}), settings).loss.item()
            for part in parts
        ]
        assert sum(pieces) == pytest.approx(grpo_loss(whole, settings).loss.item(), rel=1e-6)
