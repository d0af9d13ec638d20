"""Intervals and exact paired tests for scores on the same prompts. No sampling: equal input gives equal output."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts.

    Attributes:
        value: the mean, in [0, 1].
        n: prompts.
        interval: low and high end at the asked confidence.
    """

    value: float
    n: int
    interval: Interval


def wilson_interval(successes: float, n: float, confidence: float) -> Interval:
    """Score interval of a proportion (Wilson, 1927): no interval of width 0 at 0 or at n successes.

    Args:
        successes: how many of the trials succeeded; a fraction where `n` is an effective number of trials.
        n: trials.
        confidence: of the two-sided interval, such as 0.95.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = centre - half, centre + half
    return (0.0 if p <= 0.0 else max(low, 0.0), 1.0 if p >= 1.0 else min(high, 1.0))


def mean_estimate(values: Sequence[float], trials_each: int, confidence: float) -> Estimate:
    """Mean of one value in [0, 1] a prompt, with Wilson's interval at the effective number of trials.

    Prompts are the independent units. A value in [0, 1] has at most the variance m(1 - m) of a coin with its mean, so
    n prompts are worth n_eff = m(1 - m) / (s² / n) coin tosses (Korn and Graubard, 1998, use it so in surveys), never
    fewer than n and never more than n × trials_each. For values of 0 and 1 this is Wilson's interval itself.

    Args:
        values: one a prompt.
        trials_each: independent completions behind each value.
        confidence: of the two-sided interval.
    """
    data = np.asarray(values, dtype=np.float64)
    n, mean = len(data), float(data.mean())
    variance = float(data.var())
    effective = n * mean * (1 - mean) / variance if variance > 0 else n
    effective = min(max(effective, n), n * trials_each)
    return Estimate(mean, n, wilson_interval(mean * effective, effective, confidence))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is correct (Chen et al., 2021, arXiv:2107.03374).

    1 - C(n - c, k) / C(n, k): the share of the k-subsets of the n samples that hold a correct one.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {correct} correct among {samples} samples is not defined")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def pass_at_k_estimate(correct: Sequence[int], samples: int, k: int, confidence: float) -> Estimate:
    """Mean pass@k over prompts, from the number of correct ones among each prompt's samples."""
    return mean_estimate([pass_at_k(samples, count, k) for count in correct], samples // k, confidence)


def exact_mcnemar(wins: int, losses: int) -> tuple[float, float]:
    """Exact McNemar test of paired yes/no outcomes: a fair coin decides each discordant pair.

    Args:
        wins: prompts that only the candidate answers correctly.
        losses: prompts that only the reference answers correctly.

    Returns:
        (one-sided p-value of the candidate being better, two-sided p-value).
    """
    return sign_flip_test([1] * wins + [-1] * losses)


def sign_flip_test(differences: Sequence[int]) -> tuple[float, float]:
    """Exact paired permutation test: were candidate and reference swapped at random, prompt by prompt?

    Under the null hypothesis every difference is as likely as its negative, so the sum of n differences has 2^n equally
    likely values; all are counted (by dynamic programming over the possible sums), so the p-value has no resolution
    other than that of a float. For differences of ±1 this is the exact McNemar test. Time grows with
    n² × the largest difference: 0.05 s for 4,096 prompts of 16 samples.

    Args:
        differences: candidate minus reference, a whole number a prompt (correct completions).

    Returns:
        (one-sided p-value of the candidate being better, two-sided p-value).
    """
    sizes = sorted(abs(difference) for difference in differences if difference)
    reach = sum(sizes)
    # Choosing signs is choosing the subset of sizes that count as positive: sum = 2 × subset - reach.
    share = np.zeros(reach + 1)
    share[0], filled = 1.0, 1
    for size in sizes:
        part = share[:filled] * 0.5
        share[:filled] = part
        share[size : filled + size] += part
        filled += size
    observed = (sum(differences) + reach) // 2
    extreme = max(observed, reach - observed)
    upper, tail = _upper_tail(share, observed), _upper_tail(share, extreme)
    return upper, min(1.0, 2 * tail)


def _upper_tail(share: np.ndarray, first: int) -> float:
    return min(1.0, math.fsum(share[first:]))


def paired_difference_interval(
    candidate: Sequence[float], reference: Sequence[float], trials_each: int, confidence: float
) -> Interval:
    """Interval of mean(candidate) - mean(reference) over the same prompts.

    Square-and-add of the two means' Wilson intervals with their correlation (Newcombe, 1998, Statistics in Medicine
    17:2635, method 8; for any two intervals Zou and Donner, 2008): it never leaves [-1, 1], is no point when one model
    is always wrong or always right, and covers binary and fractional scores alike, which Wald's and Tango's do not.
    """
    first, second = (mean_estimate(values, trials_each, confidence) for values in (candidate, reference))
    r = _correlation(candidate, reference)
    (low_1, high_1), (low_2, high_2) = first.interval, second.interval
    difference = first.value - second.value
    down = _square_and_add(first.value - low_1, high_2 - second.value, r)
    up = _square_and_add(high_1 - first.value, second.value - low_2, r)
    return difference - down, difference + up


def _square_and_add(a: float, b: float, r: float) -> float:
    return math.sqrt(max(a * a - 2 * r * a * b + b * b, 0.0))


def _correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's r (phi for values of 0 and 1); 0 when one of the two is constant."""
    x, y = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else 0.0
