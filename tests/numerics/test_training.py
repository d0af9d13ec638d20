"""The optimiser against torch's own, and what one update of SFT and of RL computes, on the tiny model.

Legend: S scored tokens, N prompts, G completions a prompt.
"""

import json
import math
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.data.schema import Example
from tuneloop.errors import UserError
from tuneloop.models.forward import score
from tuneloop.models.load import load_model, load_tokenizer
from tuneloop.models.lora import attach, extract, trainable_parameters
from tuneloop.models.packed import pack
from tuneloop.models.sources import resolve_model
from tuneloop.rewards.base import Score
from tuneloop.rollout.engine import Completion
from tuneloop.settings import LoraSettings, OptimizerSettings, SamplingSettings
from tuneloop.training.collect import Rollout, RolloutGroup
from tuneloop.training.optim import MasterAdamW
from tuneloop.training.reference import ReferencePolicy
from tuneloop.training.score import rollout_gap, score_rollout
from tuneloop.training.settings import RlSettings, SftSettings
from tuneloop.training.sft import validation_loss, warm_up
from tuneloop.training.update import update_policy
from tuneloop.world import World

EXAMPLES = [
    Example(id=str(n), messages=[{"role": "user", "content": f"{n}?"}], answer=str(n % 10), completion=str(n % 10) * 3)
    for n in range(40)
]


# The optimiser


def parameters_like(shapes: list[tuple[int, ...]], dtype=torch.float32) -> list[tuple[str, nn.Parameter]]:
    generator = torch.Generator().manual_seed(1)
    return [(str(n), nn.Parameter(torch.randn(shape, generator=generator).to(dtype))) for n, shape in enumerate(shapes)]


def gradients_of_step(shapes: list[tuple[int, ...]], step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def backward(parameters: list[tuple[str, nn.Parameter]], gradients: list[torch.Tensor]) -> None:
    """A loss whose gradient is exactly the given one."""
    pairs = zip(parameters, gradients, strict=True)
    torch.stack([(parameter.float() * gradient).sum() for (_, parameter), gradient in pairs]).sum().backward()


SHAPES = [(4, 3), (5,), (2, 2, 2)]


@pytest.mark.parametrize("max_norm", [1e6, 0.5], ids=["unclipped", "clipped"])
def test_steps_equal_torch_adamw(max_norm: float):
    settings = OptimizerSettings(
        learning_rate=0.05, schedule="linear", warmup_updates=2, weight_decay=0.1, max_grad_norm=max_norm
    )
    ours, theirs = parameters_like(SHAPES), parameters_like(SHAPES)
    optimizer = MasterAdamW(ours, settings, total_updates=8)
    adam = torch.optim.AdamW(
        [p for _, p in theirs], lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    for step in range(8):
        gradients = gradients_of_step(SHAPES, step)
        backward(ours, gradients)
        norm, rate = optimizer.step()
        expected_norm = math.sqrt(sum(float(gradient.double().pow(2).sum()) for gradient in gradients))
        assert norm == pytest.approx(expected_norm, rel=1e-6)
        for (_, parameter), gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient * min(1.0, max_norm / expected_norm)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        for (_, mine), (_, reference) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-7)
            assert mine.grad is None


def test_micro_batches_add_up_and_a_step_clears_them():
    settings = OptimizerSettings(learning_rate=0.05, max_grad_norm=1e6)
    whole, parts = parameters_like(SHAPES), parameters_like(SHAPES)
    one, two = MasterAdamW(whole, settings, 2), MasterAdamW(parts, settings, 2)
    for step in range(2):
        gradients = gradients_of_step(SHAPES, step)
        backward(whole, gradients)
        backward(parts, [0.25 * gradient for gradient in gradients])
        backward(parts, [0.75 * gradient for gradient in gradients])
        assert one.step()[0] == pytest.approx(two.step()[0], rel=1e-6)
    for (_, expected), (_, mine) in zip(whole, parts, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)


def test_bfloat16_parameters_move_by_less_than_their_grid():
    """Forty steps of 1e-4 from 1.0: bfloat16 alone, whose grid is 2^-8 below 1, would never leave it."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", parameter)], OptimizerSettings(learning_rate=1e-4), 40)
    seen = []
    for _ in range(40):
        parameter.sum().backward()  # the gradient is 1, so Adam's step is the learning rate
        optimizer.step()
        seen.append(float(parameter.detach()[0]))
    torch.testing.assert_close(optimizer.state()["master"], torch.full((3,), 0.996), rtol=1e-6, atol=0.0)
    assert seen[0] == 1.0
    assert seen[-1] == 1.0 - 2**-8  # 0.996 rounded to the grid


def test_gradient_that_is_not_finite_is_refused_and_changes_nothing():
    parameters = parameters_like([(3,)])
    optimizer = MasterAdamW(parameters, OptimizerSettings(learning_rate=0.1), 3)
    before = parameters[0][1].detach().clone()
    backward(parameters, [torch.tensor([1.0, float("nan"), 1.0])])
    with pytest.raises(UserError, match=r"optimiser step 1 is not finite: .*lower the learning rate"):
        optimizer.step()
    assert torch.equal(parameters[0][1], before)
    assert optimizer.updates == 0


SCHEDULES = {  # learning rate 0.8, four warm-up steps of twelve: 0.2, 0.4, 0.6, 0.8, then
    "constant": [0.8] * 8,
    "linear": [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],  # 0.8 (1 - k/8)
    # 0.4 (1 + cos(k pi / 8)); cos of 0, 22.5, 45, 67.5, 90, … degrees: 1, 0.92388, 0.70711, 0.38268, 0, …
    "cosine": [0.8, 0.769552, 0.682843, 0.553073, 0.4, 0.246927, 0.117157, 0.030448],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_learning_rate_follows_the_schedule(schedule: Literal["constant", "linear", "cosine"]):
    settings = OptimizerSettings(learning_rate=0.8, schedule=schedule, warmup_updates=4)
    parameters = parameters_like([(2,)])
    optimizer = MasterAdamW(parameters, settings, total_updates=12)
    rates = []
    for step in range(12):
        backward(parameters, gradients_of_step([(2,)], step))
        rates.append(optimizer.step()[1])
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, *SCHEDULES[schedule]], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loaded_state_continues_to_the_same_bits(dtype: torch.dtype):
    settings = OptimizerSettings(learning_rate=0.05, schedule="cosine", warmup_updates=2, weight_decay=0.01)
    whole = parameters_like(SHAPES, dtype)
    optimizer = MasterAdamW(whole, settings, 8)
    saved = {}
    for step in range(8):
        if step == 3:
            saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
        backward(whole, gradients_of_step(SHAPES, step))
        optimizer.step()

    resumed = [(name, nn.Parameter(torch.full_like(p, 9.0))) for name, p in whole]
    again = MasterAdamW(resumed, settings, 8)
    again.load_state(saved)
    for step in range(3, 8):
        backward(resumed, gradients_of_step(SHAPES, step))
        again.step()
    for (_, expected), (_, mine) in zip(whole, resumed, strict=True):
        assert torch.equal(mine, expected)
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in optimizer.state().items())


def test_saved_state_does_not_change_with_later_steps_of_a_resumed_run():
    parameters = parameters_like([(3,)])
    optimizer = MasterAdamW(parameters, OptimizerSettings(learning_rate=0.1), 4)
    backward(parameters, [torch.ones(3)])
    optimizer.step()
    saved = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    copies = {name: tensor.clone() for name, tensor in saved.items()}
    optimizer.load_state(saved)
    backward(parameters, [torch.ones(3)])
    optimizer.step()
    assert all(torch.equal(saved[name], copies[name]) for name in saved)


# Supervised warm-up


@pytest.fixture(scope="module")
def base() -> Path:
    return resolve_model("tiny://qwen2?seed=0")


def adapted(base: Path, seed: int = 5, scale: float = 0.0):
    """The tiny model and its adapter layers; `scale` above 0 makes the adapter count from the start."""
    model = load_model(base, "float32", "cpu")
    layers = attach(model, LoraSettings(rank=4, alpha=8.0), seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in layers.values():
        layer.B.data.normal_(std=scale, generator=generator) if scale else layer.B.data.zero_()
    return model, layers


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def sft_settings(**changes) -> SftSettings:
    values = {"updates": 6, "examples_per_update": 20, "validate_every": 3,
              "optimizer": OptimizerSettings(learning_rate=0.02)}  # fmt: skip
    return SftSettings(**{**values, **changes})


def test_warm_up_lowers_the_loss_and_changes_the_adapter_alone(base: Path, tmp_path: Path):
    model, layers = adapted(base)
    before = weights(model)
    result = warm_up(
        model, layers, load_tokenizer(base), EXAMPLES[:30], EXAMPLES[30:], sft_settings(), seed=1, folder=tmp_path
    )
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{module}.{factor}" for module in layers for factor in "AB"}
    assert result.last_loss < result.first_loss - 1.0


def test_full_warm_up_changes_every_weight(base: Path, tmp_path: Path):
    model = load_model(base, "float32", "cpu")
    before = weights(model)
    settings = sft_settings(mode="full", updates=3, optimizer=OptimizerSettings(learning_rate=0.005))
    result = warm_up(model, {}, load_tokenizer(base), EXAMPLES[:30], EXAMPLES[30:], settings, seed=1, folder=tmp_path)
    assert not [name for name, tensor in weights(model).items() if torch.equal(tensor, before[name])]
    assert result.last_loss < result.first_loss - 0.5


def test_warm_up_in_small_micro_batches_collects_the_same_gradient(base: Path, tmp_path: Path):
    factors, rows = [], []
    for budget in (8, 8192):  # one example a pass; all of them in one
        model, layers = adapted(base, scale=0.1)
        settings = sft_settings(updates=1, micro_batch_tokens=budget)
        folder = tmp_path / str(budget)
        warm_up(model, layers, load_tokenizer(base), EXAMPLES, EXAMPLES[:4], settings, seed=1, folder=folder)
        rows.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]))
        factors.append(torch.cat([p.detach().flatten() for _, p in trainable_parameters(layers)]))
    for name in ("loss/train", "gradient/norm", "loss/validation"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4)
    # Adam's first step is the learning rate times the gradient's sign: near zero, rounding decides the sign.
    same = torch.isclose(*factors, rtol=1e-3, atol=1e-5)
    assert same.float().mean() > 0.999


def test_validation_loss_is_the_mean_over_tokens_whatever_the_budget(base: Path):
    model, _ = adapted(base, scale=0.1)
    groups = [([5, 6, 7], [[8, 9, 10]]), ([11], [[12]])]  # 3 + 1 tokens
    with torch.no_grad():
        by_hand = -score(model, pack(groups)).logprobs_S.sum() / 4
    for budget in (8, 8192):
        assert validation_loss(model, groups, budget) == pytest.approx(float(by_hand), rel=1e-5)


# Reinforcement learning


def rollout_of(model, rewards_NG: list[list[float]]) -> Rollout:
    """Completions of different lengths with the rewards asked for; the behaviour log-probs are the model's own."""
    groups = []
    for n, rewards in enumerate(rewards_NG):
        prompt = [20 + n, 21 + n, 22 + n]
        tokens = [[30 + n + g + place for place in range(1 + (n + g) % 3)] for g in range(len(rewards))]
        with torch.no_grad():
            logprobs = score(model, pack([(prompt, tokens)])).logprobs_S.split([len(part) for part in tokens])
        completions = [Completion(ids, part.tolist(), True) for ids, part in zip(tokens, logprobs, strict=True)]
        scores = [Score(reward, {"exact": reward}, "exact") for reward in rewards]
        groups.append(RolloutGroup(EXAMPLES[n], prompt, completions, ["x"] * len(rewards), scores))
    return Rollout(groups)


def rl_settings(rate: float = 0.01, budget: int = 8192, **algorithm) -> RlSettings:
    return RlSettings(
        prompts_per_update=4,
        optimizer=OptimizerSettings(learning_rate=rate, max_grad_norm=1e6),
        micro_batch_tokens=budget,
        algorithm=AlgorithmSettings(**algorithm),
    )


MIXED = [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.5]]
TOKENS = [1 + 2 + 3, 2 + 3 + 1, 3 + 1 + 2, 1 + 2 + 3]


@pytest.mark.parametrize(("coefficient", "trained"), [(0.0, TOKENS[0] + TOKENS[3]), (0.1, sum(TOKENS))])
def test_groups_without_a_signal_are_left_out_unless_kl_is_in_the_loss(base: Path, coefficient: float, trained: int):
    model, layers = adapted(base, scale=0.1)
    reference = ReferencePolicy(model, layers, extract(layers, {"lora_alpha": 8.0}))
    [minibatch], _ = score_rollout(model, reference, rollout_of(model, MIXED), rl_settings(kl_coefficient=coefficient))
    assert sum(len(micro.behaviour_S) for micro in minibatch.micro) == trained
    assert (minibatch.token_total, minibatch.completion_total) == (sum(TOKENS), 12)  # skipped ones count in the mean
    assert all((micro.reference_S is None) == (coefficient == 0.0) for micro in minibatch.micro)


def test_update_without_any_signal_makes_no_step(base: Path):
    model, layers = adapted(base, scale=0.1)
    reference = ReferencePolicy(model, layers, extract(layers, {"lora_alpha": 8.0}))
    optimizer = MasterAdamW(trainable_parameters(layers), OptimizerSettings(learning_rate=0.1), 4)
    before = weights(model)
    minibatches, _ = score_rollout(model, reference, rollout_of(model, [[1.0, 1.0], [0.0, 0.0]]), rl_settings())
    assert update_policy(model, optimizer, minibatches, rl_settings())["update/steps"] == 0.0
    assert optimizer.updates == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_a_rollout_without_any_signal_is_compared_with_the_trainer_all_the_same(base: Path):
    model, _ = adapted(base, scale=0.1)
    rollout = rollout_of(model, [[1.0, 1.0], [0.0, 0.0]])
    assert rollout_gap(model, rollout, SamplingSettings(), World()) < 1e-5
    for completion in rollout.groups[0].completions + rollout.groups[1].completions:
        completion.logprobs[:] = [value - 0.5 for value in completion.logprobs]
    assert rollout_gap(model, rollout, SamplingSettings(), World()) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_update_in_small_micro_batches_collects_the_same_gradient(base: Path, aggregation: str):
    collected, losses = [], []
    for budget in (8, 8192):
        model, layers = adapted(base, scale=0.1)
        settings = rl_settings(budget=budget, aggregation=aggregation, kl_coefficient=0.1)
        reference = ReferencePolicy(model, layers, extract(layers, {"lora_alpha": 8.0}))
        optimizer = MasterAdamW(trainable_parameters(layers), settings.optimizer, 1)
        for layer in layers.values():
            layer.B.data.mul_(1.1)  # away from the reference, so that KL has a gradient
        minibatches, _ = score_rollout(model, reference, rollout_of(model, MIXED), settings)
        losses.append(update_policy(model, optimizer, minibatches, settings)["loss/policy"])
        collected.append(optimizer.state()["exp_avg"].clone())  # a tenth of the gradient after the first step
    assert len(minibatches[0].micro) == 1
    assert float(collected[0].abs().max()) > 1e-3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)
    torch.testing.assert_close(collected[0], collected[1], rtol=1e-3, atol=1e-6)


def test_second_minibatch_is_held_against_the_policy_before_the_first(base: Path):
    """Loss by hand: -mean over tokens of min(r A, clip(r, 0.8, 1.2) A), r = pi(now) / pi(before the update)."""
    settings = rl_settings(rate=0.02, minibatches=2)
    rewards = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.5]]
    losses, ratio_S = [], torch.empty(0)
    for minibatches_made in (1, 2):
        model, layers = adapted(base, scale=0.1)
        reference = ReferencePolicy(model, layers, extract(layers, {"lora_alpha": 8.0}))
        optimizer = MasterAdamW(trainable_parameters(layers), settings.optimizer, 2)
        rollout = rollout_of(model, rewards)
        group = rollout.groups[1]
        batch = pack([(group.prompt, [completion.token_ids for completion in group.completions])])
        with torch.no_grad():
            old_S = score(model, batch).logprobs_S
        minibatches, _ = score_rollout(model, reference, rollout, settings)
        values = update_policy(model, optimizer, minibatches[:minibatches_made], settings)
        losses.append(minibatches_made * values["loss/policy"])  # the metric is the mean over optimiser steps
        if minibatches_made == 1:
            with torch.no_grad():
                ratio_S = (score(model, batch).logprobs_S - old_S).exp()
    # Rewards 0, 1, 0.5 have mean 0.5 and standard deviation 0.5: advantages -1, 1, 0 of 2, 3 and 1 tokens.
    advantage_S = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 0.0])
    by_hand = -torch.minimum(ratio_S * advantage_S, ratio_S.clamp(0.8, 1.2) * advantage_S).mean()
    assert float((ratio_S - 1.0).abs().max()) > 0.01
    assert losses[1] - losses[0] == pytest.approx(float(by_hand), rel=1e-3, abs=1e-5)
    assert abs(float(by_hand + advantage_S.mean())) > 1e-3  # what a ratio of 1 would have given is told apart


# The reference


def test_reference_scores_as_the_warm_up_and_leaves_the_policy_in_place(base: Path):
    model, layers = adapted(base, scale=0.1)
    batch = pack([([5, 6, 7], [[8, 9], [10]])])
    with torch.no_grad():
        warm_S = score(model, batch, 0.7).logprobs_S
    reference = ReferencePolicy(model, layers, extract(layers, {"lora_alpha": 8.0}))
    for layer in layers.values():
        layer.B.data.add_(0.05)
    model.train()
    before = weights(model)
    places = [(layer.A.data_ptr(), layer.B.data_ptr()) for layer in layers.values()]
    with torch.no_grad():
        policy_S = score(model, batch, 0.7).logprobs_S
    assert torch.equal(reference.logprobs(batch, 0.7), warm_S)
    assert float((policy_S - warm_S).abs().max()) > 1e-3
    assert places == [(layer.A.data_ptr(), layer.B.data_ptr()) for layer in layers.values()]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
    assert model.training


def test_policy_is_back_in_place_after_a_failed_forward_pass(base: Path):
    model, layers = adapted(base, scale=0.1)
    reference = ReferencePolicy(model, layers, extract(layers, {"lora_alpha": 8.0}))
    for layer in layers.values():
        layer.B.data.add_(0.05)
    before = weights(model)
    with pytest.raises(IndexError):
        reference.logprobs(pack([([5, 10**6], [[8]])]), 1.0)  # no such token
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())
