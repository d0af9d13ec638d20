"""Tables that stay tables for a screen reader when a narrow screen shows each row as a card.

Changing a row's CSS `display` takes its meaning from it in some browsers, so every part names its role; `label` is
what a card shows before the value, where a table has its column's head.
"""

from collections.abc import Sequence
from typing import Any

from tuneloop.report.html import Html, tag


def table(label: str, heads: Sequence[str], rows: Sequence[Html], cls: str = "", caption: str = "") -> Html:
    """A table in a box that scrolls by itself; with `cards` in `cls`, narrow screens show a card a row."""
    head = tag("tr", [tag("th", text, scope="col", role="columnheader") for text in heads], role="row")
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else None,
            tag("thead", head, role="rowgroup") if any(heads) else None,
            tag("tbody", rows, role="rowgroup"),
            cls=cls,
            role="table",
            aria_label=label,
        ),
        cls="scroll",
        tabindex=0,
        role="region",
        aria_label=label,
    )


def row(*cells: Any, cls: str = "") -> Html:
    """A row of `head_cell` and `cell`."""
    return tag("tr", cells, cls=cls, role="row")


def head_cell(*children: Any) -> Html:
    """What the row is about."""
    return tag("th", children, scope="row", role="rowheader")


def cell(*children: Any, label: str = "", cls: str = "", title: str | None = None) -> Html:
    """A value; `main` in `cls` keeps it beside the row's head on a card."""
    return tag("td", children, cls=cls, role="cell", data_label=label or None, title=title)
