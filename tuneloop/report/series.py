"""A metric over updates, and fewer points of it that look the same."""

import math
from dataclasses import dataclass
from pathlib import Path

from tuneloop.report.number import finite
from tuneloop.report.run_record import read_lines

NOT_METRICS = frozenset({"update", "time"})


@dataclass(frozen=True)
class Series:
    """Values of one metric at ascending updates; None where the value was not finite."""

    updates: list[int]
    values: list[float | None]

    @property
    def finite(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def last(self) -> float | None:
        return next((value for value in reversed(self.values) if value is not None), None)

    def thin(self, limit: int) -> "Series":
        """At most `limit` of the points: first, last, and each bucket's lowest, highest and not-finite one."""
        total = len(self.values)
        if total <= limit:
            return self
        width = math.ceil(total / max(1, (limit - 2) // 3))
        kept = {0, total - 1}
        for start in range(0, total, width):
            bucket = range(start, min(start + width, total))
            numbers = [(value, i) for i in bucket if (value := self.values[i]) is not None]
            if numbers:
                kept |= {min(numbers)[1], max(numbers)[1]}
            kept |= set([i for i in bucket if self.values[i] is None][:1])
        chosen = sorted(kept)
        return Series([self.updates[i] for i in chosen], [self.values[i] for i in chosen])

    def running_mean(self, window: int) -> "Series":
        """The mean of the finite values among `window` centred ones, at every update."""
        sums, counts = [0.0], [0]
        for value in self.values:
            sums.append(sums[-1] + (value or 0.0))
            counts.append(counts[-1] + (value is not None))
        means: list[float | None] = []
        for i in range(len(self.values)):
            low, high = max(0, i - window // 2), min(len(self.values), i + window // 2 + 1)
            held = counts[high] - counts[low]
            means.append((sums[high] - sums[low]) / held if held else None)
        return Series(self.updates, means)


def read_series(path: Path) -> dict[str, Series]:
    """Every metric of a `metrics.jsonl`; a repeated update keeps its last line. Missing file: no metrics."""
    rows: dict[int, dict[str, object]] = {}
    for row in read_lines(path):
        update = row.get("update")
        if isinstance(update, int) and not isinstance(update, bool):
            rows[update] = row
    found: dict[str, Series] = {}
    for update in sorted(rows):
        for name, value in rows[update].items():
            number = finite(value)
            if name in NOT_METRICS or (number is None and not isinstance(value, float)):
                continue
            series = found.setdefault(name, Series([], []))
            series.updates.append(update)
            series.values.append(number)
    return found
