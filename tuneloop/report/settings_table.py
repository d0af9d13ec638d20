"""The resolved config, one table a section."""

import json
from collections.abc import Iterator
from typing import Any

from tuneloop.report.html import Html, tag
from tuneloop.report.number import count
from tuneloop.report.run_record import RunRecord
from tuneloop.report.samples import clip

SHOWN = 200  # settings of a section


def settings(run: RunRecord) -> Html | None:
    """The section; None when the run holds no config."""
    if not run.config:
        return None
    sections: dict[str, dict[str, Any]] = {"run": {}}
    for key, value in run.config.items():
        if isinstance(value, dict):
            sections[key] = dict(_flat(value))
        else:
            sections["run"][key] = value
    return tag(
        "section",
        tag("h2", "Config"),
        tag("p", "Every setting as it was resolved, defaults included.", cls="note"),
        [_details(name, values) for name, values in sections.items() if values],
        id="config",
    )


def _details(name: str, values: dict[str, Any]) -> Html:
    rows = [
        tag("tr", tag("th", clip(key, 200), scope="row"), tag("td", tag("code", clip(_written(value), 400))))
        for key, value in list(values.items())[:SHOWN]
    ]
    if len(values) > SHOWN:
        rows.append(tag("tr", tag("td", f"… and {count(len(values) - SHOWN)} more, in config.json", colspan=2)))
    table = tag("table", tag("tbody", rows), cls="settings")
    return tag("details", tag("summary", name), tag("div", table, cls="scroll", tabindex=0, role="region",
               aria_label=f"settings of {name}"))  # fmt: skip


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names to values; a list of tables gets an index, an empty table stays."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{i}]")
    else:
        yield path, value


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
