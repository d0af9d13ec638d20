"""The account of a preparation: what was read, what became of it, and what the kept rows are like."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tuneloop.data.record import Row
from tuneloop.data.schema import SPLITS

DROP_REASONS = ("exact_duplicate", "near_duplicate", "contaminated", "prompt_too_long", "completion_too_long")
_EXAMPLES = 5


@dataclass
class SourceTally:
    """Rows of one source."""

    source: str
    read: int = 0
    kept: int = 0


@dataclass
class DataCard:
    """Counts while rows stream by; `as_json` is `data_card.json`."""

    sources: list[SourceTally] = field(default_factory=list)
    quarantined: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DROP_REASONS, 0))
    splits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    contamination: dict[str, int] = field(default_factory=dict)
    prompt_tokens: Counter[int] = field(default_factory=Counter)
    completion_tokens: Counter[int] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self):
        self._digest = hashlib.sha256()

    @property
    def read(self) -> int:
        """Rows read from all sources, bad ones included."""
        return sum(tally.read for tally in self.sources)

    @property
    def kept(self) -> int:
        """Rows in the three splits."""
        return sum(self.splits.values())

    @property
    def fingerprint(self) -> str:
        """sha256 over `<split> <id> <length> <answer> <length> <completion>\\n` of every kept row."""
        return self._digest.hexdigest()

    def keep(self, split: str, row_id: str, row: Row) -> None:
        """Count a kept row, in the order in which rows are written.

        Lengths in the fingerprint are in characters, so that no two sequences of rows give the same bytes.
        """
        self.splits[split] += 1
        line = f"{split} {row_id} {len(row.answer)} {row.answer} {len(row.completion)} {row.completion}\n"
        self._digest.update(line.encode())
        if len(self.examples) < _EXAMPLES and split == SPLITS[0]:
            messages = [{"role": role, "content": text} for role, text in zip(row.roles, row.contents, strict=True)]
            self.examples.append({"messages": messages, "answer": row.answer})

    def as_json(self) -> str:
        """The card's JSON text."""
        return json.dumps(self._content(), indent=2, ensure_ascii=False) + "\n"

    def _content(self) -> dict[str, Any]:
        return {
            "rows": {
                "read": self.read,
                "kept": self.kept,
                "quarantined": self.quarantined,
                "dropped": self.dropped,
            },
            "splits": self.splits,
            "contamination": self.contamination,
            "lengths": {
                "prompt_tokens": length_statistics(self.prompt_tokens),
                "completion_tokens": length_statistics(self.completion_tokens),
            },
            "sources": [tally.__dict__ for tally in self.sources],
            "fingerprint": self.fingerprint,
            "examples": self.examples,
        }


def length_statistics(histogram: Counter[int]) -> dict[str, float]:
    """min, p50, p95, max (nearest rank) and mean of a histogram of lengths."""
    total = sum(histogram.values())
    ordered = sorted(histogram.items())
    return {
        "min": ordered[0][0],
        "p50": _nearest_rank(ordered, 0.50 * total),
        "p95": _nearest_rank(ordered, 0.95 * total),
        "max": ordered[-1][0],
        "mean": round(sum(length * count for length, count in ordered) / total, 3),
    }


def _nearest_rank(ordered: Iterable[tuple[int, int]], rank: float) -> int:
    """The smallest length that at least `rank` rows do not exceed."""
    seen = 0
    for length, count in ordered:
        seen += count
        if seen >= rank:
            return length
    raise ValueError(f"rank {rank} is beyond the {seen} lengths")
