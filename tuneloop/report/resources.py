"""Time and memory of each step, as bars."""

from tuneloop.report.bar_chart import bar_cell
from tuneloop.report.html import Html, tag
from tuneloop.report.number import MISSING, duration, finite, size
from tuneloop.report.run_record import RunRecord, dig
from tuneloop.report.table import cell, head_cell, row, table


def resources(run: RunRecord) -> Html | None:
    """The section; None before the first step is done."""
    seconds = {name: finite(step.seconds) for name, step in run.steps.items()}
    memory = {name: finite(step.peak_rss_bytes) for name, step in run.steps.items()}
    if not any(value is not None for value in seconds.values()):
        return None
    longest = max((value or 0.0 for value in seconds.values()), default=0.0) or 1.0
    largest = max((value or 0.0 for value in memory.values()), default=0.0) or 1.0
    rows = [
        row(
            head_cell(name),
            bar_cell(_share(seconds[name], longest)),
            cell(duration(seconds[name]) if step.state == "done" else step.state, cls="number", label="time"),
            bar_cell(_share(memory[name], largest)),
            cell(size(memory[name]) if step.state == "done" else MISSING, cls="number", label="peak memory"),
        )
        for name, step in run.steps.items()
    ]
    total = row(
        head_cell("all"),
        cell(),
        cell(duration(sum(value or 0.0 for value in seconds.values())), cls="number", label="time"),
        cell(),
        cell(size(largest), cls="number", label="peak memory"),
        cls="total",
    )
    return tag(
        "section",
        tag("h2", "Time and memory"),
        tag("p", "Wall-clock time of each step, and the most memory that its process held.", _planned(run), cls="note"),
        table("time and memory of each step", ("Step", "", "Time", "", "Peak memory"), [*rows, total],
              "cards with-charts resources"),
        id="resources",
    )  # fmt: skip


def _planned(run: RunRecord) -> str | None:
    memory, disk = dig(run.plan, "memory_bytes", "total"), dig(run.plan, "disk_bytes", "total")
    if finite(memory) is None or finite(disk) is None:
        return None
    return f" The check planned at least {size(memory)} of memory for training, and {size(disk)} of disk."


def _share(value: float | None, largest: float) -> float | None:
    return None if value is None else value / largest
