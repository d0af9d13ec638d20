"""Policy losses, KL and correction against arithmetic done by hand, and gradients against finite differences."""

import dataclasses
import math

import pytest
import torch

from tuneloop.algorithms.cispo import cispo_loss
from tuneloop.algorithms.correction import importance_weights
from tuneloop.algorithms.flowrl import flowrl_loss
from tuneloop.algorithms.grpo import grpo_loss
from tuneloop.algorithms.gspo import gspo_loss
from tuneloop.algorithms.kl import kl_estimate, steered_coefficient
from tuneloop.algorithms.ppo import ppo_loss
from tuneloop.algorithms.reinforce import reinforce_loss
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.table import ALGORITHMS
from tuneloop.algorithms.traits import TRAITS
from tuneloop.algorithms.types import LossInputs

log = math.log


def inputs(logprobs, old, behaviour, advantages, owner, reference=None, **more) -> LossInputs:
    """One micro-batch that is a whole minibatch, in float64; `owner` is the completion of each token."""
    lengths = torch.bincount(torch.tensor(owner))
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in more.items()}
    return LossInputs(
        logprobs_S=torch.tensor(logprobs, dtype=torch.float64, requires_grad=True),
        old_logprobs_S=torch.tensor(old, dtype=torch.float64),
        behaviour_logprobs_S=torch.tensor(behaviour, dtype=torch.float64),
        reference_logprobs_S=None if reference is None else torch.tensor(reference, dtype=torch.float64),
        advantages_S=torch.tensor(advantages, dtype=torch.float64)[torch.tensor(owner)],
        completion_of_S=torch.tensor(owner),
        lengths_B=lengths,
        token_total=len(owner),
        completion_total=len(lengths),
        **tensors,
    )


# Completion 0 (A = 2): tokens with ratios 1.5 and 0.9. Completion 1 (A = -1): a token with ratio 0.5.
OLD = [-1.0, -1.0, -1.0]
NEW = [-1.0 + log(1.5), -1.0 + log(0.9), -1.0 + log(0.5)]
OWNER = [0, 0, 1]


def three_tokens(**more) -> LossInputs:
    return inputs(NEW, OLD, OLD, [2.0, -1.0], OWNER, **more)


# The clipped surrogate of GRPO, Dr. GRPO, RLOO, REINFORCE++, DAPO and PPO


def test_clipped_surrogate_by_hand():
    # clip to [0.8, 1.2]:  min(1.5 x 2, 1.2 x 2) = 2.4 (stopped);  min(0.9 x 2, 0.9 x 2) = 1.8;
    #                      min(0.5 x -1, 0.8 x -1) = -0.8 (stopped).
    # token mean: -(2.4 + 1.8 - 0.8) / 3 = -1.133333
    outputs = grpo_loss(three_tokens(), AlgorithmSettings())
    assert outputs.loss.item() == pytest.approx(-3.4 / 3)
    assert outputs.token_sums["clip/share"] == 2


def test_clip_higher_by_hand():
    # DAPO clips to [0.8, 1.28]: 1.28 x 2 = 2.56 instead of 2.4: -(2.56 + 1.8 - 0.8) / 3 = -1.186667
    outputs = grpo_loss(three_tokens(), AlgorithmSettings(name="dapo"))
    assert outputs.loss.item() == pytest.approx(-3.56 / 3)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ({"aggregation": "token_mean"}, -(2.4 + 1.8 - 0.8) / 3),
        ({"aggregation": "sequence_mean"}, -((2.4 + 1.8) / 2 + (-0.8) / 1) / 2),  # -(2.1 - 0.8) / 2 = -0.65
        ({"aggregation": "sequence_mean_sum_norm", "length_norm": 4}, -((2.4 + 1.8) / 4 + (-0.8) / 4) / 2),  # -0.425
    ],
    ids=lambda value: value.get("aggregation") if isinstance(value, dict) else "",
)
def test_aggregations_by_hand(aggregation: dict, expected: float):
    assert grpo_loss(three_tokens(), AlgorithmSettings(**aggregation)).loss.item() == pytest.approx(expected)


def test_gradient_on_policy_is_that_of_reinforce():
    # At ratio 1 the surrogate's gradient with respect to log p is -A / tokens: A = 3 over two tokens gives -1.5 each.
    batch = inputs([-0.3, -0.7], [-0.3, -0.7], [-0.3, -0.7], [3.0], [0, 0])
    grpo_loss(batch, AlgorithmSettings()).loss.backward()
    assert batch.logprobs_S.grad.tolist() == pytest.approx([-1.5, -1.5])


def test_clipped_tokens_have_no_gradient():
    batch = inputs([-1.0 + log(1.5)], [-1.0], [-1.0], [1.0], [0])
    grpo_loss(batch, AlgorithmSettings()).loss.backward()
    assert batch.logprobs_S.grad.tolist() == [0.0]


def test_dual_clip_by_hand():
    # A = -1. Ratio 5: min(-5, -1.2) = -5, held at c A = -3, no gradient. Ratio 2: min(-2, -1.2) = -2, gradient kept.
    # A = +1 and ratio 5: min(5, 1.2) = 1.2; the dual clip is for bad tokens alone. -(-3 - 2 + 1.2) / 3 = 1.266667
    new, old = [-3.0 + log(5.0), -3.0 + log(2.0), -3.0 + log(5.0)], [-3.0] * 3
    batch = inputs(new, old, old, [-1.0, 1.0], [0, 0, 1])
    outputs = grpo_loss(batch, AlgorithmSettings(dual_clip=3.0))
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(3.8 / 3)
    assert batch.logprobs_S.grad.tolist() == pytest.approx([0.0, 2.0 / 3, 0.0])
    assert outputs.token_sums["clip/share"] == 2
    # Without it: -(-5 - 2 + 1.2) / 3 = 1.933333
    assert grpo_loss(batch, AlgorithmSettings()).loss.item() == pytest.approx(5.8 / 3)


# The other losses


def test_reinforce_by_hand():
    # -A log p, tokens summed, over 2 completions and a constant of 4: with log p = -0.5, -1 (A = 2) and -2 (A = -1),
    # -(2 x -0.5 + 2 x -1 + -1 x -2) / (4 x 2) = -(-1 - 2 + 2) / 8 = 0.125
    settings = AlgorithmSettings(name="reinforce", length_norm=4)
    batch = inputs([-0.5, -1.0, -2.0], [-0.5, -1.0, -2.0], [-0.5, -1.0, -2.0], [2.0, -1.0], OWNER)
    outputs = reinforce_loss(batch, settings)
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(0.125)
    assert batch.logprobs_S.grad.tolist() == pytest.approx([-0.25, -0.25, 0.125])


def test_gspo_by_hand():
    # Sequence ratios: sqrt(1.5 x 0.9) = 1.161895 and 0.5. Clipped to [0.9, 1.1]:
    # min(1.161895 x 2, 1.1 x 2) = 2.2 (stopped, 2 tokens); min(0.5 x -1, 0.9 x -1) = -0.9 (stopped, 1 token).
    # Mean over completions: -(2.2 - 0.9) / 2 = -0.65
    outputs = gspo_loss(three_tokens(), AlgorithmSettings(name="gspo", clip_low=0.1, clip_high=0.1))
    assert outputs.loss.item() == pytest.approx(-0.65)
    assert outputs.token_sums["clip/share"] == 3
    # Clipped to [0.4, 1.6] nothing is stopped: -(2 x 1.161895 - 0.5) / 2 = -0.911895, and
    # d/d log p = -s A / (2 tokens x 2 completions) = -1.161895 x 2 / 4 = -0.580948 for either token.
    batch = three_tokens()
    outputs = gspo_loss(batch, AlgorithmSettings(name="gspo", clip_low=0.6, clip_high=0.6))
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(-0.911895, abs=1e-6)
    assert batch.logprobs_S.grad.tolist() == pytest.approx([-0.580948, -0.580948, 0.25], abs=1e-6)


def test_cispo_by_hand():
    # Ratios clipped to [0, 1.2]: 1.2, 0.9, 0.5; log p = -1 + log 1.5 = -0.594535, -1.105361, -1.693147.
    # -(1.2 x 2 x -0.594535 + 0.9 x 2 x -1.105361 + 0.5 x -1 x -1.693147) / 3
    #   = -(-1.426884 - 1.989649 + 0.846574) / 3 = 0.856653
    # The clipped token keeps its gradient: -1.2 x 2 / 3 = -0.8; then -0.6 and 0.166667.
    batch = three_tokens()
    outputs = cispo_loss(batch, AlgorithmSettings(name="cispo", clip_high=0.2))
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(0.856653, abs=1e-6)
    assert batch.logprobs_S.grad.tolist() == pytest.approx([-0.8, -0.6, 0.5 / 3])
    assert outputs.token_sums["clip/share"] == 1


def test_ppo_value_loss_by_hand():
    # Policy: ratio 1 and A = 0, so nothing. Values 1.0, 0.2, 0.5, before the update 0.5, 0.2, 0.4, returns 1.2, 0, 1.
    # Clipped to within 0.2 of before: 0.7, 0.2, 0.5.
    # max((1.0 - 1.2)^2, (0.7 - 1.2)^2) = 0.25;  0.04;  0.25.  Half of the mean: 0.54 / 3 / 2 = 0.09; times 0.5: 0.045.
    batch = inputs(OLD, OLD, OLD, [0.0, 0.0], OWNER, values_S=[1.0, 0.2, 0.5], old_values_S=[0.5, 0.2, 0.4],
                   returns_S=[1.2, 0.0, 1.0])  # fmt: skip
    batch.values_S.requires_grad_()
    outputs = ppo_loss(batch, AlgorithmSettings(name="ppo"))
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(0.045)
    assert outputs.token_sums["value/loss"] == pytest.approx(0.27)
    # The first is held by the clip; then 0.5 (V - R) / 3 = 0.5 x 0.2 / 3 and 0.5 x -0.5 / 3.
    assert batch.values_S.grad.tolist() == pytest.approx([0.0, 0.1 / 3, -0.25 / 3])


def test_ppo_adds_the_policy_loss():
    batch = three_tokens(values_S=[0.0] * 3, old_values_S=[0.0] * 3, returns_S=[0.0] * 3)
    assert ppo_loss(batch, AlgorithmSettings(name="ppo")).loss.item() == pytest.approx(-3.4 / 3)


FLOW = {"log_z_B": [0.3, -0.2], "reference": [-1.0, -1.2, -1.5]}
# Mean log-probs: completion 0: (-0.594535 - 1.105361) / 2 = -0.849948, reference -1.1; completion 1: -1.693147, -1.5.
# With beta 0.1 and r = 2, -1: d0 = 0.3 - 0.849948 - 0.2 + 1.1 = 0.350052; d1 = -0.2 - 1.693147 + 0.1 + 1.5 = -0.293147.
# Products of ratios: 1.5 x 0.9 = 1.35 and 0.5.


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        # clipped to 1 ± 0.2: (1.2 x 0.122536 + 0.8 x 0.085935) / 2 = 0.107896
        ({"flow_weight": "clip"}, 0.107896),
        # capped at 1.3, nothing below: (1.3 x 0.122536 + 0.5 x 0.085935) / 2 = 0.101132
        ({"flow_weight": "cap", "flow_weight_cap": 1.3}, 0.101132),
    ],
    ids=["clip", "cap"],
)
def test_flowrl_by_hand(weighting: dict, expected: float):
    settings = AlgorithmSettings(name="flowrl", flow_beta=0.1, **weighting)
    batch = three_tokens(**FLOW)
    batch.log_z_B.requires_grad_()
    outputs = flowrl_loss(batch, settings)
    outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(expected, abs=1e-6)
    assert outputs.completion_sums["flow/residual"] == pytest.approx(0.350052 + 0.293147, abs=1e-6)
    # The weight has no gradient: d loss / d log Z = w d (2 d^2 over two completions), and half of it for each of the
    # two tokens of completion 0.
    low, high = (0.8, 1.2) if weighting["flow_weight"] == "clip" else (0.5, 1.3)
    slopes = [high * 0.350052, low * -0.293147]
    assert batch.log_z_B.grad.tolist() == pytest.approx(slopes, abs=1e-6)
    assert batch.logprobs_S.grad.tolist() == pytest.approx([slopes[0] / 2, slopes[0] / 2, slopes[1]], abs=1e-6)


# The engine's numerics

ENGINE = [-1.0 - log(3.0), -1.0 + log(2.0), -1.0]  # rho = 3, 0.5 and 1


@pytest.mark.parametrize(
    ("settings", "weights", "limited"),
    [
        ({"correction": "none"}, [1.0, 1.0, 1.0], 0),
        ({"correction": "token"}, [2.0, 0.5, 1.0], 1),  # min(3, 2)
        ({"correction": "sequence"}, [1.5, 1.5, 1.0], 0),  # 3 x 0.5
        ({"correction": "sequence", "importance_cap": 1.2}, [1.2, 1.2, 1.0], 2),
        ({"correction": "icepop", "icepop_low": 0.6, "icepop_high": 4.0}, [3.0, 0.0, 1.0], 1),
        ({"correction": "icepop", "icepop_low": 0.4, "icepop_high": 2.0}, [0.0, 0.5, 1.0], 1),
    ],
    ids=str,
)
def test_importance_weights_by_hand(settings: dict, weights: list[float], limited: int):
    batch = inputs(OLD, OLD, ENGINE, [1.0, 1.0], OWNER)
    weight_S, sums = importance_weights(batch, AlgorithmSettings(**settings))
    assert weight_S.tolist() == pytest.approx(weights)
    assert sums == {"importance/mean": pytest.approx(sum(weights)), "importance/limited_share": limited}


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "reinforce", "flowrl"])
def test_importance_weight_scales_every_loss(name: str):
    # rho of the only completion's two tokens is 1.2 x 1.2 = 1.44 by sequence: all losses grow by that factor.
    settings = AlgorithmSettings(name=name, correction="sequence", aggregation="sequence_mean")
    values = []
    for engine in (-1.0, -1.0 - log(1.2)):
        batch = inputs([-1.0, -1.0], [-1.0, -1.0], [engine] * 2, [1.0], [0, 0], reference=[-1.1, -0.8], log_z_B=[0.4])
        values.append(ALGORITHMS[name].loss(batch, settings).loss.item())
    assert values[1] == pytest.approx(1.44 * values[0])


# KL


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
    value = kl_estimate(torch.tensor([log(0.5)]), torch.tensor([log(0.4)]), estimator)
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_are_unbiased(estimator: str):
    # Over the whole distribution, not over samples: sum p(x) k(x) must be KL(p || q) exactly.
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
    exact = (p * (p / q).log()).sum()
    torch.testing.assert_close((p * kl_estimate(p.log(), q.log(), estimator)).sum(), exact)


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo"])
def test_kl_enters_the_loss_with_its_coefficient(name: str):
    # A = 0, so only KL is left: 0.5 x k3 of the row above = 0.5 x 0.023144.
    settings = AlgorithmSettings(name=name, kl_coefficient=0.5, kl_estimator="k3")
    batch = inputs([log(0.5)], [log(0.5)], [log(0.5)], [0.0], [0], reference=[log(0.4)])
    assert ALGORITHMS[name].loss(batch, settings).loss.item() == pytest.approx(0.5 * 0.023144, abs=1e-6)


def test_kl_in_the_reward_is_not_in_the_loss_too():
    settings = AlgorithmSettings(kl_coefficient=0.5, kl_in="reward")
    batch = inputs([log(0.5)], [log(0.5)], [log(0.5)], [0.0], [0], reference=[log(0.4)])
    assert grpo_loss(batch, settings).loss.item() == 0.0


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.11, 0.5 * (1 + 0.1 * 0.25)),  # 10 % over the target, 256 of 1,024 completions
        (0.50, 0.5 * (1 + 0.2 * 0.25)),  # the error is held at 20 %
        (0.00, 0.5 * (1 - 0.2 * 0.25)),
        (0.10, 0.5),
    ],
)
def test_steered_coefficient_by_hand(kl: float, expected: float):
    settings = AlgorithmSettings(kl_coefficient=0.7, kl_target=0.1, kl_horizon=1024)
    assert steered_coefficient(0.5, kl, 256, settings) == pytest.approx(expected)


def test_coefficient_without_a_target_stays():
    assert steered_coefficient(0.5, 9.0, 256, AlgorithmSettings(kl_coefficient=0.5)) == 0.5


# Every loss


def random_batch(completions: int, seed: int) -> LossInputs:
    """Completions of 1 to 4 tokens, off-policy on all sides, no ratio near a clip's edge."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 5, (completions,), generator=generator)
    owner = torch.arange(completions).repeat_interleave(lengths)
    tokens = int(lengths.sum())

    def normal(size: int, scale: float) -> torch.Tensor:
        return scale * torch.randn(size, generator=generator, dtype=torch.float64)

    old = normal(tokens, 0.5) - 2.0
    return LossInputs(
        logprobs_S=(old + normal(tokens, 0.3)).requires_grad_(),
        old_logprobs_S=old,
        behaviour_logprobs_S=old + normal(tokens, 0.2),
        reference_logprobs_S=old + normal(tokens, 0.4),
        advantages_S=normal(completions, 1.0)[owner],
        completion_of_S=owner,
        lengths_B=lengths,
        token_total=tokens,
        completion_total=completions,
        values_S=normal(tokens, 0.5).requires_grad_(),
        old_values_S=normal(tokens, 0.5),
        returns_S=normal(tokens, 0.5),
        log_z_B=normal(completions, 0.5).requires_grad_(),
    )


def settings_of(name: str) -> AlgorithmSettings:
    """Wide clips for whole completions, and KL in the loss where it may be."""
    changes: dict = {"length_norm": 4} if TRAITS[name].defaults.get("aggregation") == "sequence_mean_sum_norm" else {}
    if not TRAITS[name].holds_reference:
        changes |= {"kl_coefficient": 0.3, "kl_in": "loss", "kl_estimator": "k3"}
    if name == "gspo":
        changes |= {"clip_low": 0.2, "clip_high": 0.2}
    return AlgorithmSettings(name=name, **changes)


DETACHED = {"cispo", "flowrl"}  # their weights are functions of the policy, but have no gradient: checked by hand above


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - DETACHED))
def test_gradients_equal_finite_differences(name: str):
    batch, settings = random_batch(6, seed=3), settings_of(name)

    def loss(logprobs_S: torch.Tensor, values_S: torch.Tensor) -> torch.Tensor:
        moved = dataclasses.replace(batch, logprobs_S=logprobs_S, values_S=values_S)
        return ALGORITHMS[name].loss(moved, settings).loss

    assert torch.autograd.gradcheck(loss, (batch.logprobs_S, batch.values_S), eps=1e-6, atol=1e-7)


def test_cispo_and_flowrl_gradients_equal_the_written_formulas():
    """The formulas once more, completion by completion, with the weights as plain numbers."""
    batch, settings = random_batch(6, seed=4), settings_of("cispo")
    now = batch.logprobs_S.detach()
    lp, old, behaviour = batch.logprobs_S, batch.old_logprobs_S, batch.behaviour_logprobs_S
    reference = batch.reference_logprobs_S
    total = torch.zeros((), dtype=torch.float64)
    for s in range(batch.token_total):
        ratio = min(math.exp(float(now[s] - old[s])), 5.0)
        weight = min(math.exp(float(old[s] - behaviour[s])), 2.0)
        kl = (reference[s] - lp[s]).exp() - 1 - (reference[s] - lp[s])
        total = total + (-weight * ratio * batch.advantages_S[s] * lp[s] + 0.3 * kl) / batch.token_total
    [expected] = torch.autograd.grad(total, lp)
    [found] = torch.autograd.grad(cispo_loss(batch, settings).loss, lp)
    torch.testing.assert_close(found, expected)

    settings = settings_of("flowrl")
    total = torch.zeros((), dtype=torch.float64)
    for b in range(6):
        of = batch.completion_of_S == b
        weight = min(max(math.exp(float((now[of] - old[of]).sum())), 0.8), 1.2)
        delta = batch.log_z_B[b] + lp[of].mean() - 15 * batch.advantages_S[of][0] - reference[of].mean()
        total = total + weight * delta**2 / 6
    expected = torch.autograd.grad(total, (lp, batch.log_z_B))
    found = torch.autograd.grad(flowrl_loss(batch, settings).loss, (lp, batch.log_z_B))
    torch.testing.assert_close(found, expected)


PER_COMPLETION = {"completion_of_S", "lengths_B", "log_z_B", "token_total", "completion_total"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_add_up_to_the_minibatch(name: str):
    whole, settings = random_batch(6, seed=5), settings_of(name)
    tokens = int(whole.lengths_B[:2].sum())
    pieces = []
    for first, last, start, end in ((0, 2, 0, tokens), (2, 6, tokens, whole.token_total)):
        part = {key: value[start:end] for key, value in vars(whole).items() if key not in PER_COMPLETION}
        piece = LossInputs(**part, completion_of_S=whole.completion_of_S[start:end] - first,
                           lengths_B=whole.lengths_B[first:last], log_z_B=whole.log_z_B[first:last],
                           token_total=whole.token_total, completion_total=6)  # fmt: skip
        pieces.append(ALGORITHMS[name].loss(piece, settings))
    expected = ALGORITHMS[name].loss(whole, settings)
    assert sum(piece.loss.item() for piece in pieces) == pytest.approx(expected.loss.item())
    for sums in ("token_sums", "completion_sums"):
        for key, value in getattr(expected, sums).items():
            assert sum(getattr(piece, sums)[key] for piece in pieces) == pytest.approx(value)
