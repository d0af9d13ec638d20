"""A linear axis: its domain, round ticks, and where a value falls on it."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from tuneloop.report.number import written


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to [0, 1]; `ticks` are round numbers inside."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """The share of the axis that lies before `value`."""
        return (value - self.low) / (self.high - self.low)

    def percent(self, value: float) -> str:
        """`place` as a CSS percentage, kept inside the axis."""
        return f"{min(max(self.place(value), 0.0), 1.0) * 100:.3f}%"


def tick_labels(scale: Scale, unit: str) -> list[tuple[float, str]]:
    """Each tick with its label, to as many decimals as tell neighbours apart."""
    if unit not in ("share", "number"):
        return [(tick, written(tick, unit)) for tick in scale.ticks]
    factor, sign = (100, "%") if unit == "share" else (1, "")
    steps = [after - before for before, after in pairwise(scale.ticks)]
    step = min(steps, default=0.0) * factor
    if step <= 0 or step < 1e-5 or max(abs(scale.low), abs(scale.high)) >= 1e6:
        return [(tick, written(tick, unit)) for tick in scale.ticks]
    decimals = next(d for d in range(8) if abs(round(step, d) - step) < step * 1e-6 or d == 7)
    return [(tick, f"{tick * factor + 0.0:,.{decimals}f}{sign}".replace("-", "−")) for tick in scale.ticks]


def nice_scale(
    values: Iterable[float],
    *,
    floor: float | None = None,
    ceiling: float | None = None,
    include: Iterable[float] = (),
    count: int = 4,
    whole: bool = False,
) -> Scale:
    """A domain of round numbers that holds all values.

    Args:
        floor, ceiling: the quantity's natural bounds; the domain never passes them.
        include: values that must be on the axis, such as 0.
        count: about how many intervals between ticks.
        whole: ticks are whole numbers.
    """
    held = [*values, *include] or [0.0, 1.0]
    low, high = min(held), max(held)
    if high - low <= max(abs(high), abs(low)) * 1e-9:
        margin = abs(high) * 0.1
        low, high = (low - margin, high + margin) if margin else (0.0, 1.0)
        low = max(low, floor) if floor is not None else low
        high = min(high, ceiling) if ceiling is not None else high
    step = _round_step((high - low) / count)
    step = max(1.0, step) if whole else step
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    low = max(low, floor) if floor is not None else low
    high = min(high, ceiling) if ceiling is not None else high
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return Scale(low, high, tuple(round(i * step, 12) for i in range(first, last + 1)))


def tight_scale(low: float, high: float, count: int = 5) -> Scale:
    """Exactly [low, high], with whole ticks inside; both ends are ticks and no tick crowds them."""
    if high <= low:
        return Scale(low - 0.5, high + 0.5, (low,))
    step = max(1.0, _round_step((high - low) / count))
    inner = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    apart = (high - low) / count * 0.6
    ticks = [low, *(tick for tick in inner if tick - low > apart and high - tick > apart), high]
    return Scale(low, high, tuple(ticks))


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999999)
