"""The three-peak toy: FlowRL matches a distribution that GRPO collapses on, and docs/images shows this run."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def toy():
    spec = importlib.util.spec_from_file_location("flowrl_toy", REPOSITORY / "benchmarks" / "flowrl_toy.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["flowrl_toy"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def outcomes(toy) -> dict:
    return {"FlowRL": toy.train("flowrl"), "GRPO": toy.train("grpo")}


def test_target_has_three_peaks_of_known_mass(toy):
    exact = toy.outcome(toy.target())
    assert exact.reverse_kl == pytest.approx(0.0, abs=1e-12)
    assert exact.masses == pytest.approx((0.25, 0.5, 0.25), abs=1e-6)


def test_flowrl_matches_the_distribution(outcomes):
    assert outcomes["FlowRL"].reverse_kl < 0.02
    assert outcomes["FlowRL"].masses == pytest.approx((0.25, 0.5, 0.25), abs=0.02)


def test_grpo_collapses(outcomes):
    assert outcomes["GRPO"].reverse_kl > 2.0
    assert max(outcomes["GRPO"].masses) > 0.99


def test_drawn_figure_is_this_run(toy, outcomes):
    drawn = re.findall(r"KL to the target ([0-9.]+) nats", toy.FIGURE.read_text())
    assert [float(text) for text in drawn] == pytest.approx([o.reverse_kl for o in outcomes.values()], abs=0.002)
