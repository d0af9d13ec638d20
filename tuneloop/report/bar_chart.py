"""Intervals and bars inside table cells, so that the chart and its table are one thing."""

from collections.abc import Sequence

from tuneloop.report.html import Html, tag
from tuneloop.report.scale import Scale, tick_labels
from tuneloop.report.table import cell


def interval_cell(scale: Scale, value: float, interval: Sequence[float] | None, colour: str) -> Html:
    """A dot with its interval on the scale."""
    parts = _guides(scale)
    if interval:
        low, high = scale.percent(interval[0]), scale.percent(interval[1])
        parts.append(tag("i", cls="whisker", style=f"left:{low};right:calc(100% - {high})"))
    parts.append(tag("i", cls="dot", style=f"left:{scale.percent(value)}"))
    return cell(tag("div", parts, cls=f"track c-{colour}", aria_hidden="true"), cls="chart-cell")


def scale_row(scale: Scale, unit: str, before: int, after: int) -> Html:
    """The axis under the chart cells of a table, with empty cells beside it."""
    ticks = [tag("span", label, style=f"left:{scale.percent(tick)}") for tick, label in tick_labels(scale, unit)]
    axis = tag("td", tag("div", ticks, cls="ticks", aria_hidden="true"), cls="chart-cell")
    return tag("tr", [tag("td")] * before, axis, [tag("td")] * after, cls="scale", aria_hidden="true")


def bar_cell(share: float | None, colour: str = "neutral") -> Html:
    """A horizontal bar as long as `share` of the cell."""
    bar = None if not share else tag("i", cls="bar", style=f"width:{max(share * 100, 0.4):.3f}%")
    return cell(tag("div", bar, cls=f"bar-track c-{colour}", aria_hidden="true"), cls="chart-cell")


def _guides(scale: Scale) -> list[Html]:
    return [
        tag("i", cls="guide zero" if tick == 0 else "guide", style=f"left:{scale.percent(tick)}")
        for tick in scale.ticks
    ]
