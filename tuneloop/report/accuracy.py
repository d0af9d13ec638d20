"""How good each model is, with intervals, and how far the candidate is from each."""

from tuneloop.report.bar_chart import interval_cell, scale_row
from tuneloop.report.comparison import METRIC_NAMES, Comparison, comparisons, interval_name, interval_of, score
from tuneloop.report.html import Html, tag
from tuneloop.report.number import MISSING, count, finite, p_value, percent, plain, points
from tuneloop.report.run_record import MODELS, RunRecord, dig
from tuneloop.report.scale import Scale, nice_scale
from tuneloop.report.table import cell, head_cell, row, table

CARDS = "cards with-charts"
NAMES = {"base": "Base", "sft": "SFT warm-up", "candidate": "Candidate", "incumbent": "Incumbent"}


def accuracy(run: RunRecord) -> Html | None:
    """The section; None before the evaluation."""
    models = run.evaluation.get("models")
    if not models:
        return None
    present = [name for name in MODELS if name in models]
    made = comparisons(run)
    return tag(
        "section",
        tag("h2", "Accuracy"),
        tag("p", _what_was_asked(run), cls="note"),
        _models_table(run, present),
        tag("h3", "The candidate against each model") if made else None,
        _differences_table(made, interval_name(run)) if made else None,
        _metrics_table(run, present),
        id="accuracy",
    )


def _what_was_asked(run: RunRecord) -> str:
    prompts, samples = run.evaluation.get("prompts"), run.evaluation.get("samples")
    told = f"Every model answered the same {count(prompts)} held-out prompts, once with its most likely answer"
    return told + (f" and {count(samples)} times sampled." if samples else ".")


def _models_table(run: RunRecord, present: list[str]) -> Html:
    ks = sorted({k for name in present for k in dig(run.evaluation, "models", name, "pass_at") or {}}, key=int)
    scores = {name: score(run, name) for name in present}
    values = [number for held in scores.values() for number in _numbers(held)]
    scale = nice_scale(values, floor=0.0, ceiling=1.0, include=[0.0] if min(values, default=0) < 0.3 else [])
    rows = [
        row(
            head_cell(model_mark(name)),
            _dot(scale, scores[name], name),
            cell(tag("b", percent(scores[name].get("value"))), cls="number main"),
            cell(_between(scores[name]), cls="number quiet", label=interval_name(run)),
            [_pass_at(run, name, k) for k in ks],
            cls="candidate-row" if name == "candidate" else "",
        )
        for name in present
    ]
    heads = ["Model", "", "Accuracy", interval_name(run), *(f"pass@{k}" for k in ks)]
    return table("accuracy of each model", heads, [*rows, scale_row(scale, "share", 1, 2 + len(ks))], CARDS)


def _pass_at(run: RunRecord, name: str, k: str) -> Html:
    held = score(run, name, f"pass_at_{k}")
    interval = _between(held)
    return cell(percent(held.get("value")), cls="number", label=f"pass@{k}",
                title=f"{interval_name(run)} {interval}" if interval else None)  # fmt: skip


def _differences_table(made: list[Comparison], interval: str) -> Html:
    values = [number for one in made for number in (one.difference, *(one.interval or ()))]
    scale = nice_scale(values, floor=-1.0, ceiling=1.0, include=[0.0])
    rows = [
        row(
            head_cell(model_mark(one.reference)),
            interval_cell(scale, one.difference, one.interval, "candidate"),
            cell(tag("b", points(one.difference)), cls="number main"),
            cell(f"{points(one.interval[0])} to {points(one.interval[1])}" if one.interval else MISSING,
                 cls="number quiet", label=interval),
            cell(p_value(one.p_value), cls="number", label="p-value"),
            cell(f"{count(one.wins)} / {count(one.losses)}", cls="number", label="won / lost"),
            cell(METRIC_NAMES.get(one.metric, one.metric), cls="number", label="by"),
        )
        for one in made
    ]  # fmt: skip
    heads = ["Against", "", "Points", interval, "p-value", "Won / lost", "By"]
    in_points = Scale(scale.low * 100, scale.high * 100, tuple(round(tick * 100, 6) for tick in scale.ticks))
    return table("differences in percentage points", heads, [*rows, scale_row(in_points, "number", 1, 5)], CARDS)


def _metrics_table(run: RunRecord, present: list[str]) -> Html | None:
    held = {name: dig(run.evaluation, "models", name, "metrics") or {} for name in present}
    names = list(dict.fromkeys(metric for metrics in held.values() for metric in metrics))
    if not names:
        return None
    words = [metric.replace("_", " ") for metric in names]
    rows = [
        row(
            head_cell(model_mark(name)),
            [cell(_metric(metric, held[name].get(metric)), cls="number", label=word)
             for metric, word in zip(names, words, strict=True)],
        )
        for name in present
    ]  # fmt: skip
    return tag("div", tag("h3", "Means over the answers"),
               table("means over the answers", ["Model", *words], rows, "cards"))  # fmt: skip


def model_mark(name: str) -> Html:
    """A model's name with its colour and shape."""
    swatch = tag("i", cls=f"model-mark c-{name if name in MODELS else 'neutral'} m-{name}", aria_hidden="true")
    return tag("span", swatch, NAMES.get(name, name), cls="model")


def _metric(name: str, value: object) -> str:
    return percent(value) if name.endswith("_share") else plain(value, 3)


def _numbers(held: dict) -> list[float]:
    value = finite(held.get("value"))
    return [*([] if value is None else [value]), *(interval_of(held.get("ci95")) or ())]


def _between(held: dict) -> str:
    interval = interval_of(held.get("ci95"))
    return f"{percent(interval[0])} to {percent(interval[1])}" if interval else ""


def _dot(scale: Scale, held: dict, name: str) -> Html:
    value = finite(held.get("value"))
    if value is None:
        return cell(cls="chart-cell")
    return interval_cell(scale, value, interval_of(held.get("ci95")), f"{name} m-{name}")
