"""The pieces that the report's charts and texts are made of."""

import math
import re
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloop.report.html import Html, join, tag, text
from tuneloop.report.number import duration, p_value, percent, plain, points, size
from tuneloop.report.scale import nice_scale, tick_labels, tight_scale
from tuneloop.report.series import Series, read_series

finite = st.floats(-1e9, 1e9, allow_nan=False)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (percent(0.8423), "84.2%"),
        (percent(None), "—"),
        (points(0.316), "+31.6"),
        (points(-0.02), "−2.0"),
        (plain(0.0), "0"),
        (plain(1234.56), "1,235"),
        (plain(0.09206), "0.09206"),
        (plain(3.1e-24, 3), "3.1 × 10⁻²⁴"),
        (plain(2.5e7), "2.5 × 10⁷"),
        (plain(float("nan")), "—"),
        (p_value(0.0031), "0.0031"),
        (p_value(0.281), "0.28"),
        (p_value(0.0), "0"),
        (duration(0.42), "0.4 s"),
        (duration(94), "1 min 34 s"),
        (duration(7509), "2 h 05 min"),
        (size(1_900_000_000), "1.9 GB"),
        (size(999), "999 B"),
    ],
)
def test_numbers_are_written_as_people_read_them(written, expected):
    assert written == expected


def test_html_escapes_what_is_not_html():
    assert tag("p", "<b>", Html("<i></i>"), title='"') == '<p title="&quot;">&lt;b&gt;<i></i></p>'
    assert tag("a", None, [1, ["x"]], hidden=True, href=None) == "<a hidden>1x</a>"
    assert join(["a", None, "&"]) == "a&amp;"
    assert text("a\x00b\x85") == "a␀b\ufffd"


@given(st.lists(finite, min_size=1, max_size=30))
def test_scale_holds_its_values_between_round_ticks(values):
    scale = nice_scale(values)
    assert 1 <= len(scale.ticks) <= 12
    assert all(-1e-6 <= scale.place(value) <= 1 + 1e-6 for value in values)


def test_scale_stays_inside_natural_bounds():
    scale = nice_scale([0.97, 1.0], floor=0.0, ceiling=1.0)
    assert scale.high == 1.0
    assert nice_scale([0.0, 0.0], floor=0.0, include=[0.0]).low == 0.0
    assert (nice_scale([0.0]).low, nice_scale([0.0]).high) == (0.0, 1.0)
    assert nice_scale([1.0, 1.0], floor=0.0, ceiling=1.0).high == 1.0


def test_neighbouring_ticks_never_share_a_label():
    for top in (0.0007, 0.002, 0.03, 0.4, 1.0, 30.0, 4321.0):
        for unit in ("share", "number"):
            labels = [label for _, label in tick_labels(nice_scale([0.0, top]), unit)]
            assert len(set(labels)) == len(labels), labels


def test_update_axis_ends_at_the_first_and_last_update():
    assert tight_scale(1, 40).ticks == (1, 10, 20, 30, 40)
    assert tight_scale(7, 7).ticks == (7,)


@given(st.lists(st.one_of(st.none(), finite), min_size=61, max_size=120), st.integers(12, 60))
def test_thinned_series_keeps_ends_and_extremes(values, limit):
    series = Series(list(range(1, len(values) + 1)), values)
    thin = series.thin(limit)
    assert len(thin.values) <= limit
    assert (thin.updates[0], thin.updates[-1]) == (1, len(values))
    assert dict(zip(thin.updates, thin.values, strict=True)).items() <= dict(enumerate(values, 1)).items()
    if series.finite:
        assert (min(thin.finite), max(thin.finite)) == (min(series.finite), max(series.finite))
    if None in values:
        assert None in thin.values


def test_running_mean_by_hand():
    # windows of 3, the missing value left out: (1+2)/2, (1+2)/2, (2+6)/2, 6
    assert Series([1, 2, 3, 4], [1.0, 2.0, None, 6.0]).running_mean(3).values == [1.5, 1.5, 4.0, 6.0]


def test_metrics_keep_the_last_line_of_an_update_and_pass_over_damage(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 2, "time": 1, "a": 1}\n{"update": 1, "a": 5}\n{"update": 2, "a": NaN}\n[]\n{"upd')
    series = read_series(path)
    assert list(series) == ["a"]
    assert series["a"].updates == [1, 2]
    assert series["a"].values == [5.0, None]
    assert read_series(tmp_path / "none") == {}


def _themes() -> dict[str, dict[str, str]]:
    css = (files("tuneloop.report") / "page.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.S)[:2]
    blocks = {"light": light, "dark": dark}
    return {name: dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for name, block in blocks.items()}


def _contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else math.pow((c + 0.055) / 1.055, 2.4) for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_have_enough_contrast(theme):
    colours = _themes()[theme]
    for ground in ("page", "surface"):
        for words in ("ink", "quiet", "good", "bad"):  # WCAG AA for text
            assert _contrast(colours[words], colours[ground]) >= 4.5, (words, ground)
    assert _contrast(colours["good"], colours["good-surface"]) >= 4.5
    assert _contrast(colours["bad"], colours["bad-surface"]) >= 4.5
    assert _contrast(colours["quiet"], colours["bad-surface"]) >= 4.5
    assert _contrast(colours["candidate"], colours["page"]) >= 4.5
    for drawn in ("base", "sft", "incumbent", "second", "third", "fourth", "neutral"):  # WCAG AA for graphics
        assert _contrast(colours[drawn], colours["page"]) >= 3, drawn
