"""The data card: what was read, what was kept, what was dropped and why, how long it is, and what it looks like."""

from typing import Any

from tuneloop.report.bar_chart import bar_cell
from tuneloop.report.html import Html, join, tag
from tuneloop.report.number import count, finite, percent, plain
from tuneloop.report.run_record import RunRecord, dig, read_lines
from tuneloop.report.samples import clip
from tuneloop.report.table import cell, head_cell, row, table

EXAMPLES = 4
QUARANTINED = 3
SOURCES = 12
SPLIT_USES = {"train": "trained on", "validation": "for the curves", "test": "for the gate"}


def data(run: RunRecord, *, characters: int = 700) -> Html | None:
    """The section; None before data_prep is done. Long texts are cut at `characters`."""
    card = run.data_card
    if not card:
        return None
    return tag(
        "section",
        tag("h2", "Data"),
        tag("p", _sources(card), cls="note"),
        tag("div", _counts(card), _lengths(card), cls="two-columns"),
        _overlap(card),
        _quarantine(run, characters),
        _examples(card, characters),
        id="data",
    )


def _sources(card: dict[str, Any]) -> Html:
    told = [
        f"{dig(source, 'source')} ({count(dig(source, 'kept'))} of {count(dig(source, 'read'))} rows kept)"
        for source in card.get("sources") or []
    ]
    more = f" and {count(len(told) - SOURCES)} more" if len(told) > SOURCES else ""
    return join([f"From {', '.join(told[:SOURCES])}{more}."] if told else [])


def _counts(card: dict[str, Any]) -> Html:
    rows, splits = card.get("rows") or {}, card.get("splits") or {}
    read = finite(rows.get("read")) or 0.0
    lines = [("read", rows.get("read"), ""), ("quarantined", rows.get("quarantined"), "")]
    lines += [(f"dropped: {reason.replace('_', ' ')}", n, "") for reason, n in (rows.get("dropped") or {}).items() if n]
    lines += [("kept", rows.get("kept"), "kept")]
    lines += [(f"{name}, {SPLIT_USES.get(name, 'split')}", n, "split") for name, n in splits.items()]
    body = [
        row(
            head_cell(name),
            bar_cell((finite(n) or 0.0) / read if read else None),
            cell(count(n), cls="number main"),
            cell(percent((finite(n) or 0.0) / read) if read else "", cls="number quiet main"),
            cls=kind,
        )
        for name, n, kind in lines
        if n is not None
    ]
    return table("rows", (), body, "cards with-charts", caption="Rows")


def _lengths(card: dict[str, Any]) -> Html | None:
    lengths = card.get("lengths") or {}
    columns = ("min", "p50", "mean", "p95", "max")
    body = [
        row(
            head_cell(name.replace("_tokens", "")),
            [cell(plain(dig(held, column), 3), cls="number") for column in columns],
        )
        for name, held in lengths.items()
    ]
    return table("lengths in tokens", ("", *columns), body, caption="Lengths in tokens") if body else None


def _overlap(card: dict[str, Any]) -> Html | None:
    """Whether a held-out prompt was trained on too."""
    shared, held_out = dig(card, "contamination", "overlapping"), dig(card, "contamination", "evaluation_rows")
    if finite(shared) is None or finite(held_out) is None:
        return None
    number = count(shared) if shared else "None"
    told = f"{number} of the {count(held_out)} held-out prompts is among the training prompts."
    mark = tag("span", "✗" if shared else "✓", cls="mark", aria_hidden="true")
    return tag("ul", tag("li", mark, tag("span", told), cls="bad" if shared else "good"), cls="checks")


def _quarantine(run: RunRecord, characters: int) -> Html | None:
    folder = run.steps["data_prep"].folder
    if not folder or not dig(run.data_card, "rows", "quarantined"):
        return None
    rows = []
    for bad in read_lines(folder / "quarantine.jsonl"):
        where = f"{bad.get('source')}, line {bad.get('line')}: {bad.get('reason')}"
        rows.append(tag("li", tag("b", where), tag("pre", clip(bad.get("text", ""), characters), dir="auto")))
        if len(rows) == QUARANTINED:
            break
    return tag("details", tag("summary", "Quarantined rows, the first ones"), tag("ul", rows, cls="plain-list"))


def _examples(card: dict[str, Any], characters: int) -> Html | None:
    examples = (card.get("examples") or [])[:EXAMPLES]
    if not examples:
        return None
    drawn = []
    for example in examples:
        said = [
            tag("p", tag("span", dig(message, "role"), cls="tag"),
                tag("span", clip(dig(message, "content"), characters), cls="said", dir="auto"))
            for message in dig(example, "messages") or []
        ]  # fmt: skip
        answer = tag("span", clip(dig(example, "answer"), characters), cls="said", dir="auto")
        drawn.append(tag("li", said, tag("p", tag("span", "answer", cls="tag"), answer), cls="example"))
    return tag("div", tag("h3", "Examples"), tag("ul", drawn, cls="examples"))
