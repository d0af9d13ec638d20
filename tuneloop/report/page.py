"""The page: sections in the order in which they are read, in one file that needs nothing else."""

import base64
import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from string import Template

from tuneloop import __version__
from tuneloop.report.accuracy import accuracy
from tuneloop.report.answers import answers
from tuneloop.report.curve_chart import ChartBook
from tuneloop.report.curves import training
from tuneloop.report.data import data
from tuneloop.report.harness import harness
from tuneloop.report.html import Html, join, tag, text
from tuneloop.report.lineage import lineage
from tuneloop.report.resources import resources
from tuneloop.report.run_record import RunRecord
from tuneloop.report.samples import samples
from tuneloop.report.settings_table import settings
from tuneloop.report.verdict import headline, verdict

MAX_BYTES = 2_000_000
TITLES = {
    "accuracy": "Accuracy",
    "harness": "lm-evaluation-harness",
    "training": "Training",
    "samples": "Completions",
    "answers": "Changed answers",
    "data": "Data",
    "resources": "Time and memory",
    "lineage": "Lineage",
    "config": "Config",
}


@dataclass(frozen=True)
class Budget:
    """How much of a run the page shows: points a curve, prompts, and characters a text."""

    points: int
    prompts: int
    characters: int


BUDGETS = (Budget(600, 8, 700), Budget(200, 6, 300), Budget(60, 3, 120))


def page(run: RunRecord) -> str:
    """The whole page as HTML, under `MAX_BYTES`: a run too large for it is shown with fewer points and texts."""
    html = ""
    for budget in BUDGETS:
        html = _page(run, budget)
        if len(html.encode()) <= MAX_BYTES:
            break
    return html


def _page(run: RunRecord, budget: Budget) -> str:
    book = ChartBook(budget.points)
    sections = {
        "accuracy": accuracy(run),
        "harness": harness(run),
        "training": training(run, book),
        "samples": samples(run, prompts=budget.prompts, characters=budget.characters),
        "answers": answers(run, shown=budget.prompts, characters=budget.characters),
        "data": data(run, characters=budget.characters),
        "resources": resources(run),
        "lineage": lineage(run),
        "config": settings(run),
    }
    present = {name: section for name, section in sections.items() if section}
    contents = [tag("li", tag("a", TITLES[name], href=f"#{name}")) for name in present]
    body = join(
        [
            verdict(run),
            tag("nav", tag("ul", contents), aria_label="contents") if contents else None,
            tag("main", present.values()),
            _unreadable(run),
            tag("footer", f"tuneloop {__version__}, run {run.name}"),
        ]
    )
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Template(_asset("page.html")).substitute(
        title=text(f"{run.name}: {headline(run)}"),
        script_hash=f"sha256-{digest}",
        style=_asset("page.css"),
        body=body,
        data=_script_json(book.data),
        script=script,
    )


def _unreadable(run: RunRecord) -> Html | None:
    told = [tag("li", line) for line in run.unreadable]
    return tag("section", tag("h2", "Could not be read"), tag("ul", told), cls="warning") if told else None


def _script_json(value: object) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (files("tuneloop.report") / name).read_text(encoding="utf-8")
