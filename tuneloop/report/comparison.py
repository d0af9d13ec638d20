"""The comparison that the gate decides by, and the others."""

from dataclasses import dataclass
from typing import Any

from tuneloop.report.number import finite
from tuneloop.report.run_record import RunRecord, dig

METRIC_NAMES = {"accuracy": "accuracy", "pass_at_1": "pass@1"}


@dataclass(frozen=True)
class Comparison:
    """The candidate against one reference model on the same prompts; differences are shares in [-1, 1]."""

    reference: str
    metric: str
    difference: float
    interval: tuple[float, float] | None
    p_value: float | None
    prompts: int | None
    wins: int | None
    losses: int | None


def comparisons(run: RunRecord) -> list[Comparison]:
    """Every comparison of the evaluation, the gate's metric first and the incumbent before the base."""
    primary = dig(run.config, "evaluate", "gate", "primary") or "accuracy"
    order = ["incumbent", "base", "sft"]
    found = [made for row in run.evaluation.get("comparisons") or [] if (made := _comparison(row))]
    rank = {name: i for i, name in enumerate(order)}
    return sorted(found, key=lambda made: (made.metric != primary, rank.get(made.reference, len(order))))


def score(run: RunRecord, model: str, metric: str = "accuracy") -> dict[str, Any]:
    """`{"value", "n", "ci95"}` of a model, or an empty mapping."""
    record = dig(run.evaluation, "models", model)
    found = dig(record, "pass_at", metric.removeprefix("pass_at_")) if metric != "accuracy" else dig(record, metric)
    return found if isinstance(found, dict) else {}


def interval_name(run: RunRecord) -> str:
    """What the intervals are called: `95% interval`, or what the run was asked for."""
    confidence = run.evaluation.get("confidence") or dig(run.config, "evaluate", "confidence") or 0.95
    return f"{confidence * 100:g}% interval"


def interval_of(value: Any) -> tuple[float, float] | None:
    """`[low, high]` as two finite numbers, or None."""
    low, high = finite(dig(value, 0)), finite(dig(value, 1))
    return None if low is None or high is None else (low, high)


def _comparison(row: Any) -> Comparison | None:
    difference = finite(dig(row, "difference"))
    if difference is None:
        return None
    return Comparison(
        reference=str(dig(row, "reference")),
        metric=str(dig(row, "metric") or "accuracy"),
        difference=difference,
        interval=interval_of(dig(row, "ci95")),
        p_value=finite(dig(row, "p_value")),
        prompts=dig(row, "n"),
        wins=dig(row, "wins"),
        losses=dig(row, "losses"),
    )
