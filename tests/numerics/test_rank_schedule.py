"""Ranks that change during RL: growth is exact, shrinking loses what it says, moments follow, a kill changes nothing.

Legend: R rank, K new rank, I inputs and O outputs of a matrix.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny_rl import CI_UPDATES, rl_trainer, warmed_up
from tuneloop.models.adapter_io import load_adapter, save_adapter
from tuneloop.models.forward import score
from tuneloop.models.lora import trainable_parameters
from tuneloop.models.packed import pack
from tuneloop.settings import LoraSettings, OptimizerSettings
from tuneloop.training.optim import MasterAdamW
from tuneloop.training.policy import Policy
from tuneloop.training.rank_schedule import (
    RankScheduler,
    Spectrum,
    deal_ranks,
    grow,
    mean_rank,
    remap_state,
    shrink,
    spectrum_of,
)
from tuneloop.training.settings import RankScheduleSettings, RlSettings


def factors(rank: int, seed: int = 0, inputs: int = 12, outputs: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)


# One module


def test_spectrum_is_that_of_the_product():
    a_RI, b_OR = factors(5)
    expected = torch.linalg.svdvals(3.0 * (b_OR.double() @ a_RI.double()))[:5]
    torch.testing.assert_close(spectrum_of(a_RI, b_OR, 3.0), expected, rtol=1e-10, atol=1e-10)


def test_growth_keeps_the_product_to_the_last_bit():
    a_RI, b_OR = factors(3)
    change = grow(a_RI, b_OR, torch.randn(2, 12, generator=torch.Generator().manual_seed(7)))
    assert (change.a_KI.shape, change.b_OK.shape, change.dropped) == ((5, 12), (9, 5), 0.0)
    assert torch.equal(change.a_KI[:3], a_RI)
    assert torch.equal(change.b_OK[:, :3], b_OR)
    assert not change.b_OK[:, 3:].any()
    assert change.a_KI[3:].abs().min() > 0
    assert torch.equal(change.b_OK.double() @ change.a_KI.double(), b_OR.double() @ a_RI.double())


def test_shrinking_is_the_best_approximation_and_loses_what_it_says():
    a_RI, b_OR = factors(6)
    whole = b_OR.double() @ a_RI.double()
    change = shrink(a_RI, b_OR, 4)
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    best = left[:, :4] * values[:4] @ right[:4]
    torch.testing.assert_close(change.b_OK.double() @ change.a_KI.double(), best, rtol=1e-5, atol=1e-5)
    lost = float((whole - change.b_OK.double() @ change.a_KI.double()).square().sum())
    assert change.dropped == pytest.approx(float(values[4:].square().sum()), rel=1e-6)
    assert lost == pytest.approx(change.dropped, rel=1e-4)


def test_shrunk_rows_of_a_are_orthogonal_and_as_long_as_before():
    a_RI, b_OR = factors(6)
    change = shrink(a_RI, b_OR, 4)
    length = float(a_RI.square().sum() / 6)  # mean square of the old rows' lengths
    torch.testing.assert_close(change.a_KI @ change.a_KI.T, length * torch.eye(4), rtol=0, atol=1e-4)


def test_directions_that_b_does_not_use_yet_can_still_be_learned():
    """Rank 4 of which 2 are used, shrunk to 3: nothing is lost, and the unused one has a row of A to learn from."""
    a_RI, b_OR = factors(4)
    b_OR[:, 2:] = 0.0
    change = shrink(a_RI, b_OR, 3)
    assert change.dropped == pytest.approx(0.0, abs=1e-20)
    torch.testing.assert_close(change.b_OK @ change.a_KI, b_OR @ a_RI, rtol=1e-5, atol=1e-5)
    assert float(change.b_OK[:, 2].abs().max()) < 1e-6
    assert float(change.a_KI[2].norm()) == pytest.approx(float(a_RI.square().sum() / 4) ** 0.5, rel=1e-5)


def test_moments_by_hand():
    """Rows of A scaled by 3 and 4 along two axes, B the identity times 5 and 1: singular values 15 and 4, so rank 1
    keeps the first direction. c^2 = (9 + 16)/2, c = 3.5355. New a = c e_1 = (c/3) a_1, new b = (3 * 5/c) e_1.
    So N = (c/3, 0) and M = (3/c, 0)^T. A gradient by B is multiplied with N^T, one by A with M^T, squares with squares.
    """
    a_RI, b_OR = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    change = shrink(a_RI, b_OR, 1)
    c = math.sqrt(12.5)
    sign = float(change.a_KI[0, 0].sign())
    torch.testing.assert_close(sign * change.a_KI, torch.tensor([[c, 0.0, 0.0]]))
    torch.testing.assert_close(sign * change.b_OK, torch.tensor([[15 / c], [0.0]]))
    assert change.dropped == pytest.approx(16.0)
    gradient_a, gradient_b = torch.tensor([[1.0, 2.0, 3.0], [9.0, 9.0, 9.0]]), torch.tensor([[6.0, 9.0], [7.0, 9.0]])
    mapped_a, mapped_b = change.moments("A", gradient_a, False), change.moments("B", gradient_b, False)
    torch.testing.assert_close(sign * mapped_a, torch.tensor([[1.0, 2.0, 3.0]]) * 3 / c)
    torch.testing.assert_close(sign * mapped_b, torch.tensor([[6.0], [7.0]]) * c / 3)
    torch.testing.assert_close(change.moments("A", gradient_a, True), torch.tensor([[1.0, 2.0, 3.0]]) * 9 / 12.5)
    torch.testing.assert_close(change.moments("B", gradient_b, True), torch.tensor([[6.0], [7.0]]) * 12.5 / 9)


def test_mapped_first_moments_are_the_gradients_by_the_new_factors():
    """Of any loss of W = B A: here its inner product with a fixed matrix, at factors whose last ranks are unused."""
    a_RI, b_OR = factors(5)
    b_OR[:, 3:] = 0.0
    change = shrink(a_RI, b_OR, 3)
    target_OI = torch.randn(9, 12, generator=torch.Generator().manual_seed(5))

    def gradients(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        (b @ a * target_OI).sum().backward()
        assert a.grad is not None
        assert b.grad is not None
        return a.grad, b.grad

    old_a, old_b = gradients(a_RI, b_OR)
    new_a, new_b = gradients(change.a_KI, change.b_OK)
    torch.testing.assert_close(change.moments("A", old_a, False), new_a, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(change.moments("B", old_b, False), new_b, rtol=1e-4, atol=1e-4)


def test_growth_pads_moments_with_zeros():
    a_RI, b_OR = factors(2)
    change = grow(a_RI, b_OR, torch.ones(1, 12))
    for squared in (False, True):
        assert torch.equal(change.moments("A", a_RI, squared), torch.cat([a_RI, torch.zeros(1, 12)]))
        assert torch.equal(change.moments("B", b_OR, squared), torch.cat([b_OR, torch.zeros(9, 1)], 1))


def test_state_keeps_what_does_not_change():
    shapes = [("m.lora_A", torch.Size([2, 3])), ("m.lora_B", torch.Size([2, 2])), ("heads.w", torch.Size([4]))]
    flat = torch.arange(14.0)
    state = {"master": flat, "exp_avg": flat + 20, "exp_avg_sq": flat + 40, "adam_step": torch.tensor(5.0)}
    change = grow(flat[:6].view(2, 3), flat[6:10].view(2, 2), torch.full((1, 3), 0.5))
    mapped = remap_state(state, shapes, {"m": change})
    expected = [0, 1, 2, 3, 4, 5, 0.5, 0.5, 0.5, 6, 7, 0, 8, 9, 0, 10, 11, 12, 13]
    assert mapped["master"].tolist() == expected
    assert mapped["exp_avg"].tolist() == [20, 21, 22, 23, 24, 25, 0, 0, 0, 26, 27, 0, 28, 29, 0, 30, 31, 32, 33]
    assert mapped["exp_avg_sq"][-4:].tolist() == [50, 51, 52, 53]
    assert mapped["adam_step"] is state["adam_step"]


# Dealing ranks out


def test_rank_goes_where_it_carries_most_energy_for_its_cost():
    """Budget 8 with costs 1 and 2, least rank 1: 1 + 2 = 3 are gone. Energies of the next: wide 9/2, 4/2; slim 1, 1/4.
    So wide gets two more (cost 4, 7 in all), then slim one, and nothing is left."""
    spectra = {"slim": Spectrum([2.0, 1.0, 0.5], 1.0, 8), "wide": Spectrum([4.0, 3.0, 2.0], 2.0, 8)}
    settings = RankScheduleSettings(kind="spectrum", growth=0)
    assert deal_ranks(spectra, 8.0, settings) == {"slim": 2, "wide": 3}


def test_flat_spectra_grow_first_and_by_no_more_than_they_may():
    """Beyond its last value a spectrum is continued as it falls: the flat one stays at 1, the steep one is at 1/4."""
    spectra = {"flat": Spectrum([1.0, 1.0], 1.0, 9), "steep": Spectrum([1.0, 0.5], 1.0, 9)}
    assert spectra["flat"].energy(3) == pytest.approx(1.0)
    assert spectra["steep"].energy(2) == pytest.approx(0.25**2)  # 0.5 times the ratio 0.5
    settings = RankScheduleSettings(kind="spectrum", growth=2)
    assert deal_ranks(spectra, 5.0, settings) == {"flat": 4, "steep": 1}
    assert deal_ranks(spectra, 100.0, settings) == {"flat": 4, "steep": 4}
    narrow = {"flat": Spectrum([1.0, 1.0], 1.0, 3), "steep": spectra["steep"]}
    assert deal_ranks(narrow, 5.0, settings) == {"flat": 3, "steep": 2}


def test_fresh_adapters_share_the_budget_evenly():
    spectra = {name: Spectrum([0.0] * 4, 1.0, 9) for name in "abc"}
    assert deal_ranks(spectra, 6.0, RankScheduleSettings(kind="spectrum")) == {"a": 2, "b": 2, "c": 2}


def test_budget_is_annealed():
    settings = RankScheduleSettings(kind="spectrum", initial=16, final=4, anneal=0.5)
    assert [mean_rank(settings, 8.0, update, 40) for update in (0, 10, 20, 40)] == [16, 10, 4, 4]
    assert mean_rank(RankScheduleSettings(kind="spectrum"), 8.0, 30, 40) == 8.0
    assert mean_rank(RankScheduleSettings(kind="spectrum", final=2, anneal=1.0), 8.0, 20, 40) == 5.0


def test_engine_plans_for_the_largest_rank_there_can_be():
    lora = LoraSettings(rank=24, rank_pattern={"q_proj": 40})
    assert RankScheduleSettings().largest(lora.largest_rank) == 40
    assert RankScheduleSettings(kind="spectrum").largest(40) == 80
    assert RankScheduleSettings(kind="spectrum", max_rank=48).largest(40) == 48


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"min_rank": 8, "final": 4}, "final = 4 is below min_rank = 8"),
        ({"max_rank": 8, "initial": 16}, "max_rank is below the mean rank"),
    ],
)
def test_settings_that_contradict_each_other(settings, says):
    with pytest.raises(ValueError, match=says):
        RankScheduleSettings(kind="spectrum", **settings)


def test_full_fine_tuning_has_no_ranks():
    with pytest.raises(ValueError, match='mode = "full" trains none'):
        RlSettings(mode="full", rank_schedule=RankScheduleSettings(kind="spectrum"))


# A whole adapter


def a_few_steps(rank: int = 6) -> tuple[Policy, MasterAdamW]:
    """The tiny model's adapter after three optimiser steps on fixed tokens."""
    policy = warmed_up(LoraSettings(rank=rank, alpha=12.0))
    optimizer = MasterAdamW(policy.parameters(), OptimizerSettings(learning_rate=0.01), 10)
    for step in range(3):
        optimizer.backward(-score(policy.model, pack([([5, 6, 7 + step], [[8, 9], [10]])])).logprobs_S.sum())
        optimizer.step()
    return policy, optimizer


def logprobs(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return score(policy.model, pack([([5, 6, 7, 8], [[9, 10, 11], [12]])])).logprobs_S


def change(policy: Policy, optimizer: MasterAdamW, **settings) -> tuple[float, RankScheduler]:
    scheduler = RankScheduler(policy, RankScheduleSettings(kind="spectrum", anneal=1e-9, **settings), 10)
    shapes = [(name, parameter.shape) for name, parameter in policy.parameters()]
    state, dropped = scheduler.change(1, optimizer.state(), shapes)
    optimizer.release()
    MasterAdamW(trainable_parameters(policy.layers), optimizer.settings, 10).load_state(state)
    return dropped, scheduler


def test_growing_adapter_says_the_same():
    policy, optimizer = a_few_steps()
    before, scalings = logprobs(policy), {name: layer.scaling for name, layer in policy.layers.items()}
    dropped, scheduler = change(policy, optimizer, final=8, growth=4)
    assert dropped == 0.0
    assert scheduler.metrics()["rank/total"] > 14 * 6
    assert min(layer.A.shape[0] for layer in policy.layers.values()) >= 6
    torch.testing.assert_close(logprobs(policy), before, rtol=1e-6, atol=1e-6)
    assert {name: layer.scaling for name, layer in policy.layers.items()} == scalings


@pytest.mark.parametrize("budget", ["rank", "parameters"])
def test_shrinking_adapter_stays_in_the_budget_and_says_what_it_lost(budget):
    policy, optimizer = a_few_steps()
    before = {name: layer.scaling * (layer.B @ layer.A).detach() for name, layer in policy.layers.items()}
    dropped, scheduler = change(policy, optimizer, final=2, budget=budget)
    after = {name: layer.scaling * (layer.B @ layer.A).detach() for name, layer in policy.layers.items()}
    lost = sum(float((before[name] - after[name]).square().sum()) for name in before)
    whole = sum(float(value.square().sum()) for value in before.values())
    assert dropped == pytest.approx(math.sqrt(lost / whole), rel=1e-3)
    assert 0.0 < dropped < 0.8
    metrics = scheduler.metrics()
    sides = [sum(layer.base.weight.shape) for layer in policy.layers.values()]
    within = 14 * 2 if budget == "rank" else 2 * sum(sides)
    assert within * 0.9 <= metrics["rank/total" if budget == "rank" else "rank/parameters"] <= within
    assert metrics["rank/min"] < metrics["rank/max"]


# A run


SCHEDULE = {"kind": "spectrum", "every": 2, "initial": 4, "final": 2, "growth": 2}


def test_run_changes_ranks_and_a_kill_changes_nothing(tmp_path: Path):
    """Six updates at once, and as four that are saved, killed in the fifth (a rank change behind it) and resumed."""
    whole = rl_trainer(tmp_path / "whole", SCHEDULE)
    result = whole.run()
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    totals = [row["rank/total"] for row in rows[1:]]
    assert len(set(totals)) > 1
    assert totals[-1] <= 14 * 2.5
    assert [row["rank/dropped"] > 0 for row in rows[1:]] == [update in (2, 4) for update in range(1, CI_UPDATES + 1)]
    assert all(row["canary/gap"] < 1e-3 for row in rows[1:])

    killed = rl_trainer(tmp_path / "killed", SCHEDULE)
    killed.start()
    for _ in range(5):
        killed.advance()  # checkpoints after 2 and 4
    shutil.copytree(tmp_path / "killed", tmp_path / "resumed")
    resumed = rl_trainer(tmp_path / "resumed", SCHEDULE)
    assert resumed.state.update == 4
    assert resumed.learner.ranks.metrics()["rank/total"] == totals[3]
    assert resumed.run().adapter_digest == result.adapter_digest
    states = whole.learner.state(), resumed.learner.state()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_adapter_of_many_ranks_is_exported_as_it_computes(tmp_path: Path):
    trainer = rl_trainer(tmp_path / "run", SCHEDULE)
    trainer.run()
    adapter = trainer.policy.adapter()
    save_adapter(adapter, tmp_path / "adapter")
    loaded = load_adapter(tmp_path / "adapter")
    ranks = {a.shape[0] for a, _ in loaded.factors.values()}
    assert len(ranks) > 1
    assert (loaded.config["r"], loaded.digest()) == (max(ranks), adapter.digest())
    assert len({loaded.scaling(module) for module in loaded.factors}) == 1
    for module, layer in trainer.policy.layers.items():
        assert loaded.scaling(module) == layer.scaling
        assert torch.equal(loaded.factors[module][1], layer.B)  # equal scalings: nothing was folded
