"""DAPO's dynamic sampling: groups whose rewards are all equal are replaced by groups of further prompts.

Yu et al., 2025 (arXiv:2503.14476), section 3.2. Which prompts a round takes is a function of the seed, the update and
what was sampled so far in this update, so a resumed run takes the same ones.
"""

import math
from collections.abc import Callable, Sequence

from tuneloop.rng import permutation
from tuneloop.training.collect import Rollout, RolloutGroup
from tuneloop.training.data_order import rows_of_update

_FURTHER = 0x5DEECE66D  # tells the order of further prompts from that of the data
SMALLEST_YIELD = 0.25  # share of prompts with spread that a round counts on, at least

Sample = Callable[[Sequence[int], Sequence[int]], Rollout]


def collect_with_spread(sample: Sample, *, seed: int, update: int, wanted: int, rows: int, max_rounds: int) -> Rollout:
    """`wanted` groups, as many of them as possible with unequal rewards; the others sampled are its `discarded`.

    The first round takes the prompts that the update would take anyway. Further rounds take prompts of an order of
    their own, as many as are missing over the share that had spread so far, and none twice in an update.

    Args:
        sample: samples and judges completions of row numbers, with a name of its own for each prompt.
        update: from 0.
        wanted: prompts an update.
        rows: rows there are.
        max_rounds: further rounds at most; groups without spread fill up what is then missing.
    """
    first = rows_of_update(seed, update, wanted, rows)
    groups = sample(first, range(wanted)).groups
    further: list[int] | None = None
    for _ in range(max_rounds):
        spread = sum(map(has_spread, groups))
        if spread >= wanted:
            break
        if further is None:
            taken = set(first)
            further = [row for row in permutation(seed ^ _FURTHER, update, rows).tolist() if row not in taken]
        count = min(wanted, math.ceil((wanted - spread) / max(spread / len(groups), SMALLEST_YIELD)))
        chosen, further = further[:count], further[count:]
        if not chosen:
            break
        names = range(len(groups), len(groups) + len(chosen))
        groups = groups + sample(chosen, names).groups
    ranked = sorted(range(len(groups)), key=lambda n: not has_spread(groups[n]))  # stable: in the order of sampling
    kept = set(ranked[:wanted])
    return Rollout(
        [group for n, group in enumerate(groups) if n in kept],
        [group for n, group in enumerate(groups) if n not in kept],
    )


def has_spread(group: RolloutGroup) -> bool:
    """Whether the group's rewards are not all equal."""
    return any(score.total != group.scores[0].total for score in group.scores)
