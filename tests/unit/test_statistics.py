"""Intervals and exact tests: values worked out by hand, scipy's, and coverage by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tuneloop.evaluation.statistics import (
    exact_mcnemar,
    mean_estimate,
    paired_difference_interval,
    pass_at_k,
    pass_at_k_estimate,
    sign_flip_test,
    wilson_interval,
)


def test_wilson_interval_by_hand():
    # n = 10, p = 0.8, z = 1.959964, z² = 3.841459: centre (0.8 + 0.192073) / 1.384146 = 0.716740,
    # half 1.959964 · sqrt(0.8·0.2/10 + 3.841459/400) / 1.384146 = 1.959964 · 0.160011 / 1.384146 = 0.226577
    assert wilson_interval(8, 10, 0.95) == pytest.approx((0.490162, 0.943318), abs=2e-6)


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (1, 20), (437, 512), (512, 512)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_wilson_interval_is_scipys(successes, n, confidence):
    theirs = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert wilson_interval(successes, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_pass_at_k_by_hand():
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 2, 2) == pytest.approx(1 - 1 / 6)  # of 6 pairs only one holds no correct sample
    assert pass_at_k(4, 1, 4) == 1.0
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(5, 3, 3) == 1.0  # only 2 wrong ones: every triple holds a correct one
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(4, 1, 5)


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(case):
    samples, correct, k = case
    subsets = list(itertools.combinations(range(samples), k))
    assert pass_at_k(samples, correct, k) == pytest.approx(
        sum(any(i < correct for i in subset) for subset in subsets) / len(subsets)
    )


def test_the_interval_of_binary_values_is_wilsons():
    estimate = mean_estimate([1] * 8 + [0] * 2, 1, 0.95)
    assert (estimate.value, estimate.n) == (0.8, 10)
    assert estimate.interval == pytest.approx(wilson_interval(8, 10, 0.95))


def test_several_samples_a_prompt_narrow_the_interval_as_far_as_they_carry_information():
    # all prompts alike (2 of 4 each): s² = 0, taken as n = 10 tosses, the careful end
    assert mean_estimate([0.5] * 10, 4, 0.95).interval == pytest.approx(wilson_interval(5, 10, 0.95))
    # prompts that are all or nothing: 4 samples say no more than 1, n_eff = 10 · 0.25 / 0.25 = 10
    assert mean_estimate([0, 1] * 5, 4, 0.95).interval == pytest.approx(wilson_interval(5, 10, 0.95))
    # s² = 0.25² = 0.0625: n_eff = 10 · 0.25 / 0.0625 = 40, as many as there are samples
    assert mean_estimate([0.25, 0.75] * 5, 4, 0.95).interval == pytest.approx(wilson_interval(20, 40, 0.95))
    estimate = pass_at_k_estimate([1, 3] * 5, 4, 1, 0.95)
    assert estimate.value == 0.5
    assert estimate.interval == pytest.approx(wilson_interval(20, 40, 0.95))


def test_exact_mcnemar_by_hand():
    # 9 wins, 1 loss: P(X >= 9), X ~ Bin(10, 1/2) = (10 + 1) / 1024
    assert exact_mcnemar(9, 1) == pytest.approx((11 / 1024, 22 / 1024))
    # 1 win, 9 losses: P(X >= 1) = 1 - 1/1024
    assert exact_mcnemar(1, 9) == pytest.approx((1023 / 1024, 22 / 1024))
    assert exact_mcnemar(0, 0) == (1.0, 1.0)


@pytest.mark.parametrize(("wins", "losses"), [(5, 5), (17, 4), (400, 10), (3, 80), (0, 6)])
def test_exact_mcnemar_is_scipys_binomial_test(wins, losses):
    one_sided = stats.binomtest(wins, wins + losses, alternative="greater").pvalue
    two_sided = stats.binomtest(wins, wins + losses).pvalue
    assert exact_mcnemar(wins, losses) == pytest.approx((one_sided, two_sided), rel=1e-9)


def test_sign_flip_test_by_hand():
    # |d| = 1, 2, 3: sums of the 8 sign choices are -6 -4 -2 0 0 2 4 6; observed 3 + 2 - 1 = 4: two are >= 4
    assert sign_flip_test([-1, 2, 3]) == pytest.approx((2 / 8, 4 / 8))
    assert sign_flip_test([0, 0, 4]) == pytest.approx((1 / 2, 1.0))


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_sign_flip_test_counts_every_sign_choice(differences):
    sums = [
        sum(sign * size for sign, size in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    one_sided = sum(total >= sum(differences) for total in sums) / len(sums)
    two_sided = sum(abs(total) >= abs(sum(differences)) for total in sums) / len(sums)
    assert sign_flip_test(differences) == pytest.approx((one_sided, two_sided))


def test_sign_flip_test_is_scipys_permutation_test():
    differences = np.random.default_rng(5).integers(-4, 6, 12)
    theirs = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    assert sign_flip_test(differences.tolist())[0] == pytest.approx(theirs.pvalue)


def test_the_tests_keep_their_size_under_the_null_hypothesis():
    generator = np.random.default_rng(11)
    rejected = 0
    for _ in range(2000):
        counts = generator.binomial(4, generator.random(64)[:, None], size=(64, 2))
        rejected += sign_flip_test((counts[:, 0] - counts[:, 1]).tolist())[0] < 0.05
    assert rejected / 2000 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_paired_difference_interval_by_hand():
    # 10 prompts, both right 5, candidate only 3, reference only 1, neither 1: p1 = 0.8, p2 = 0.6
    ours, theirs = [1] * 8 + [0] * 2, [1] * 5 + [0] * 3 + [1, 0]
    # phi = (5·1 - 3·1) / sqrt(8·2·6·4) = 2 / 19.595918 = 0.102062
    # Wilson: (0.490162, 0.943318) and (0.312674, 0.831820)
    # down: a = 0.8 - 0.490162 = 0.309838, b = 0.831820 - 0.6 = 0.231820:
    #       sqrt(0.0959996 - 2·0.102062·0.309838·0.231820 + 0.0537405) = sqrt(0.1350783) = 0.367530
    # up:   a = 0.943318 - 0.8 = 0.143318, b = 0.6 - 0.312674 = 0.287326:
    #       sqrt(0.0205400 - 2·0.102062·0.143318·0.287326 + 0.0825562) = sqrt(0.0946906) = 0.307718
    assert paired_difference_interval(ours, theirs, 1, 0.95) == pytest.approx(
        (0.2 - 0.367530, 0.2 + 0.307718), abs=5e-6
    )


def test_paired_difference_interval_has_width_where_a_model_is_always_wrong():
    low, high = paired_difference_interval([1] * 64, [0] * 64, 1, 0.95)
    assert 0.9 < low < 0.96
    assert high == 1.0
    low, high = paired_difference_interval([0] * 64, [0] * 64, 1, 0.95)
    assert low == pytest.approx(-high)
    assert 0.04 < high < 0.08


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=40))
def test_intervals_hold_their_estimate_and_stay_in_range(pairs):
    ours, theirs = ([count / 4 for count in column] for column in zip(*pairs, strict=True))
    difference = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    low, high = paired_difference_interval(ours, theirs, 4, 0.95)
    assert -1.0 - 1e-12 <= low <= difference + 1e-12
    assert difference - 1e-12 <= high <= 1.0 + 1e-12
    estimate = mean_estimate(ours, 4, 0.95)
    assert 0.0 <= estimate.interval[0] <= estimate.value + 1e-12
    assert estimate.value - 1e-12 <= estimate.interval[1] <= 1.0
    swapped = paired_difference_interval(theirs, ours, 4, 0.95)
    assert swapped == pytest.approx((-high, -low))


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("kind", ["near the ends", "alike", "same prompts are hard"])
def test_95_percent_intervals_cover_about_95_percent(samples, kind):
    generator = np.random.default_rng(3)
    repeats, covered, paired_covered = 600, 0, 0
    for _ in range(repeats):
        hardness = generator.random(100)
        ours, theirs, mean, difference = {
            "near the ends": (np.full(100, 0.98), np.full(100, 0.03), 0.98, 0.95),
            "alike": (np.full(100, 0.5), np.full(100, 0.45), 0.5, 0.05),
            "same prompts are hard": (hardness, hardness**2, 0.5, 0.5 - 1 / 3),
        }[kind]
        first, second = generator.binomial(samples, ours) / samples, generator.binomial(samples, theirs) / samples
        low, high = mean_estimate(first, samples, 0.95).interval
        covered += low <= mean <= high
        low, high = paired_difference_interval(first, second, samples, 0.95)
        paired_covered += low <= difference <= high
    assert 0.92 <= covered / repeats <= 0.99
    assert 0.92 <= paired_covered / repeats <= 0.99
