"""A line chart over updates: the curves are an SVG that stretches, the labels are HTML that does not.

The SVG is drawn with `preserveAspectRatio="none"` and strokes that do not scale, so one file is sharp and readable
from a phone to a wall; points are zero-length strokes with round caps for the same reason.
"""

from dataclasses import dataclass, field
from typing import Any

from tuneloop.report.html import Html, tag
from tuneloop.report.number import count, written
from tuneloop.report.scale import Scale, nice_scale, tick_labels, tight_scale
from tuneloop.report.series import Series

WIDTH, HEIGHT = 1000, 300  # SVG units
SMOOTH_FROM = 60  # updates; longer curves are drawn as a faint line and its running mean


@dataclass(frozen=True)
class Line:
    """One curve: a series, its name in the legend, its colour class, and whether its points are marked."""

    label: str
    series: Series
    colour: str = "candidate"
    marked: bool = False


@dataclass
class ChartBook:
    """Numbers the charts of a page and gathers the data that the page's script shows on hover."""

    point_limit: int = 600
    data: list[dict[str, Any]] = field(default_factory=list)

    def curve(
        self,
        title: str,
        lines: list[Line],
        *,
        unit: str = "number",
        note: str = "",
        zero: bool = False,
        updates: tuple[int, int] | None = None,
        axis: str = "rl",
        size: str = "",
    ) -> Html:
        """One chart as a figure.

        Args:
            unit: how values are written: share, number, count, seconds or bytes.
            note: what the curve says, in a few words.
            zero: the axis begins at zero.
            updates: the first and last update of the axis; a curve ends before it when the run was stopped.
            axis: charts that share it show the pointer's update together.
            size: "wide" takes the whole row, "half" half of it.
        """
        drawn = [line for line in lines if line.series.finite]
        if not drawn:
            return _empty(title, lines, note)
        seen = [update for line in drawn for update in (line.series.updates[0], line.series.updates[-1])]
        x = tight_scale(*(updates or (min(seen), max(seen))))
        values = [value for line in drawn for value in line.series.finite]
        y = nice_scale(
            values,
            floor=0.0 if unit in ("share", "bytes", "seconds", "count") and min(values) >= 0 else None,
            ceiling=1.0 if unit == "share" and max(values) <= 1 else None,
            include=[0.0] if zero else [],
        )
        number = len(self.data)
        thinned = [Line(line.label, line.series.thin(self.point_limit), line.colour, line.marked) for line in drawn]
        self.data.append(_payload(title, unit, thinned, x, y))
        return tag(
            "figure",
            tag("figcaption", tag("h3", title), tag("p", note, cls="note") if note else None),
            _legend(drawn, unit),
            _plot(drawn, thinned, x, y, unit, _description(title, drawn, unit)),
            _not_finite(drawn),
            cls=f"curve {size}".strip(),
            data_chart=number,
            data_axis=axis,
        )


def _payload(title: str, unit: str, lines: list[Line], x: Scale, y: Scale) -> dict[str, Any]:
    return {
        "title": title,
        "unit": unit,
        "x": [x.low, x.high],
        "y": [y.low, y.high],
        "lines": [
            {
                "label": line.label,
                "colour": line.colour,
                "x": line.series.updates,
                "y": [None if value is None else float(f"{value:.6g}") for value in line.series.values],
            }
            for line in lines
        ],
    }


def _legend(lines: list[Line], unit: str) -> Html:
    items = [
        tag(
            "li",
            tag("i", cls="swatch marked" if line.marked else "swatch", aria_hidden="true"),
            tag("span", line.label if len(lines) > 1 else "last"),
            tag("b", written(line.series.last, unit)),
            cls=f"c-{line.colour}",
        )
        for line in lines
    ]
    return tag("ul", items, cls="legend", title="the last value of each curve")


def _plot(lines: list[Line], thinned: list[Line], x: Scale, y: Scale, unit: str, description: str) -> Html:
    grid = [
        tag("path", d=f"M0 {_y(y, tick)}H{WIDTH}", cls="zero" if tick == 0 else "grid")
        for tick in y.ticks
    ]  # fmt: skip
    curves = [path for line, thin in zip(lines, thinned, strict=True) for path in _paths(line, thin, x, y)]
    svg = tag(
        "svg", *grid, *curves, viewbox=f"0 0 {WIDTH} {HEIGHT}", preserveaspectratio="none", aria_hidden="true"
    )  # fmt: skip
    y_labels = [tag("span", label, style=f"bottom:{y.percent(tick)}") for tick, label in tick_labels(y, unit)]
    x_labels = [tag("span", count(tick), style=f"left:{x.percent(tick)}") for tick in x.ticks]
    return tag(
        "div",
        tag("div", y_labels, cls="y-axis", aria_hidden="true"),
        tag("div", svg, cls="plot", role="img", aria_label=description, tabindex=0),
        tag("div", x_labels, cls="x-axis", aria_hidden="true"),
        cls="frame",
    )


def _paths(line: Line, thin: Line, x: Scale, y: Scale) -> list[Html]:
    colour = f"c-{line.colour}"
    if line.marked:
        dots = "".join(
            f"M{_x(x, u)} {_y(y, v)}h0" for u, v in zip(thin.series.updates, thin.series.values, strict=True)
            if v is not None
        )  # fmt: skip
        return [
            tag("path", d=_path(thin.series, x, y), cls=f"line {colour}"),
            tag("path", d=dots, cls=f"dots {colour}"),
        ]
    total = len(line.series.values)
    if total < SMOOTH_FROM:
        return [tag("path", d=_path(thin.series, x, y), cls=f"line {colour}")]
    mean = line.series.running_mean(max(5, total // 40)).thin(240)
    return [
        tag("path", d=_path(thin.series, x, y), cls=f"line raw {colour}"),
        tag("path", d=_path(mean, x, y), cls=f"line {colour}"),
    ]


def _path(series: Series, x: Scale, y: Scale) -> str:
    """The curve; it breaks where a value was not finite, and a lone value is a short stroke."""
    written_path, pen_down = [], False
    for update, value in zip(series.updates, series.values, strict=True):
        if value is None:
            pen_down = False
            continue
        written_path.append(f"{'L' if pen_down else 'M'}{_x(x, update)} {_y(y, value)}{'' if pen_down else 'h0'}")
        pen_down = True
    return "".join(written_path)


def _x(scale: Scale, update: float) -> str:
    return f"{scale.place(update) * WIDTH:.1f}".removesuffix(".0")


def _y(scale: Scale, value: float) -> str:
    return f"{(1 - scale.place(value)) * HEIGHT:.1f}".removesuffix(".0")


def _description(title: str, lines: list[Line], unit: str) -> str:
    told = []
    for line in lines:
        numbers = line.series.finite
        told.append(
            f"{line.label} from {written(numbers[0], unit)} to {written(numbers[-1], unit)} "
            f"(lowest {written(min(numbers), unit)}, highest {written(max(numbers), unit)})"
        )
    first, last = lines[0].series.updates[0], lines[0].series.updates[-1]
    return f"{title}, updates {count(first)} to {count(last)}: {'; '.join(told)}"


def _not_finite(lines: list[Line]) -> Html | None:
    for line in lines:
        gaps = [u for u, v in zip(line.series.updates, line.series.values, strict=True) if v is None]
        if gaps:
            times = "value is" if len(gaps) == 1 else "values are"
            where = f"first at update {count(gaps[0])}"
            return tag("p", f"{line.label}: {count(len(gaps))} {times} not a finite number, {where}.", cls="warning")
    return None


def _empty(title: str, lines: list[Line], note: str) -> Html:
    told = f"{lines[0].label}: no value is a finite number." if lines else "No values."
    caption = tag("figcaption", tag("h3", title), tag("p", note, cls="note") if note else None)
    return tag("figure", caption, tag("p", told, cls="warning"), cls="curve")
