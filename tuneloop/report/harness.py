"""Tasks of lm-evaluation-harness, model by model."""

from tuneloop.report.accuracy import NAMES, model_mark
from tuneloop.report.html import Html, tag
from tuneloop.report.number import MISSING, count, finite, plain
from tuneloop.report.run_record import MODELS, RunRecord, dig
from tuneloop.report.table import cell, head_cell, row, table


def harness(run: RunRecord) -> Html | None:
    """The section; None when no tasks were run."""
    held = dig(run.evaluation, "harness", "models") or {}
    present = [name for name in MODELS if name in held]
    measured = dict.fromkeys(
        (task, metric) for name in present for task, metrics in held[name].items() for metric in metrics
    )
    if not measured:
        return None
    rows = [
        row(
            head_cell(task),
            cell(_metric(metric, held, present, task), label="metric"),
            [_value(dig(held, name, task, metric), NAMES[name]) for name in present],
            cell(count(dig(held, present[0], task, metric, "n")), cls="number quiet", label="documents"),
        )
        for task, metric in measured
    ]
    heads = ["Task", "Metric", *(model_mark(name) for name in present), "Documents"]
    return tag(
        "section",
        tag("h2", "lm-evaluation-harness"),
        tag("p", _told(run), cls="note"),
        table("results of lm-evaluation-harness", heads, rows, "cards"),
        id="harness",
    )


def _told(run: RunRecord) -> str:
    settings = run.evaluation["harness"]
    shots, limit = settings.get("num_fewshot"), settings.get("limit")
    told = f"lm-eval {settings.get('lm_eval')} on the weights that the engine samples from; ± is a standard error."
    told += f" {count(shots)} examples in each prompt." if shots is not None else ""
    return told + (f" Only the first {count(limit)} documents of each task." if limit else "")


def _metric(metric: str, held: dict, present: list[str], task: str) -> str:
    better = dig(held, present[0], task, metric, "higher_is_better")
    return metric + {True: " ↑", False: " ↓"}.get(better, "")  # type: ignore[arg-type]


def _value(score: object, name: str) -> Html:
    value, error = finite(dig(score, "value")), finite(dig(score, "stderr"))
    if value is None:
        return cell(MISSING, cls="number", label=name)
    return cell(tag("b", plain(value)), f" ± {plain(error, 2)}" if error else "", cls="number", label=name)
