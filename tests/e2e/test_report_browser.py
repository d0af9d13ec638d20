"""The report in a real browser: drawn, quiet, usable by pointer, finger and keyboard, and safe in a sandbox."""

import json
import shutil

import pytest

from tests.report_run import ATTACK, fail_in, make_run
from tuneloop.report import build_report
from tuneloop.report.curve_chart import ChartBook, Line
from tuneloop.report.number import written
from tuneloop.report.page import MAX_BYTES
from tuneloop.report.series import Series, read_series

playwright_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is missing")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium, chromium-browser or google-chrome on PATH")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip
NARROW, WIDE = 375, 1280
PATIENCE = 120_000  # milliseconds; a browser on a busy machine is slow to start
STEP_THROUGH = """(plot, count) => Array.from({length: count}, (_, i) => {
  plot.dispatchEvent(new KeyboardEvent("keydown", {key: i ? "ArrowRight" : "Home"}));
  return plot.querySelector(".tooltip b").textContent;
})"""


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Pages of a promoted, a kept, a failed and a very long run."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {
        "promoted": make_run(folder / "promoted"),
        "kept": make_run(folder / "kept", promoted=False),
        "failed": fail_in(make_run(folder / "failed"), "lora_rl", "out_of_memory_" * 30, 1, lines=23),
        "long": make_run(folder / "long", updates=5000),
    }
    return {name: build_report(run).html for name, run in runs.items()}


class Visit:
    """A page that remembers what it should not have done."""

    def __init__(self, browser, width=WIDE, **options):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.context.close()


def plot_of(page, title):
    return page.locator("figure", has=page.get_by_role("heading", name=title, exact=True)).locator(".plot")


def hover(page, plot, share):
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] * share, box["y"] + box["height"] / 2)


@pytest.mark.parametrize(
    ("name", "scheme", "width"),
    [
        ("promoted", "light", WIDE), ("promoted", "dark", NARROW), ("kept", "dark", WIDE), ("failed", "light", NARROW),
        ("failed", "dark", 800), ("long", "light", NARROW),
    ],
)  # fmt: skip
def test_page_is_drawn_without_noise_or_overflow(browser, reports, name, scheme, width):
    with Visit(browser, width, color_scheme=scheme) as visit:
        visit.page.goto(reports[name].as_uri())
        visit.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert visit.said == []
        assert visit.asked == [reports[name].as_uri()]
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        ground = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(14, 18, 22)"}[scheme]
        plot = plot_of(visit.page, "Reward").bounding_box()
        assert plot["width"] > 200
        assert plot["height"] > 100
        drawn = visit.page.locator("figure .plot svg path.line").first.bounding_box()
        assert drawn["width"] > 50


def test_hover_shows_the_update_and_its_values_with_a_crosshair(browser, reports):
    series = read_series(reports["promoted"].parent.parent / "lora_rl" / "metrics.jsonl")
    with Visit(browser) as visit:
        visit.page.goto(reports["promoted"].as_uri())
        plot = plot_of(visit.page, "Reward")
        hover(visit.page, plot, (30 - 1) / (40 - 1))  # update 30 of 1 … 40
        rows = plot.locator(".tooltip div").all_inner_texts()
        assert rows[0] == "update 30"
        assert rows[1].split() == ["training", written(series["reward/mean"].values[29], "number")]
        assert rows[2].split() == ["validation", written(series["validation/reward"].values[5], "number")]
        box, cursor = plot.bounding_box(), plot.locator(".cursor").bounding_box()
        assert cursor["x"] == pytest.approx(box["x"] + box["width"] * 29 / 39, abs=1)
        other = plot_of(visit.page, "Entropy")
        assert other.locator(".cursor").is_visible()  # the same update, in every chart of the section
        assert not other.locator(".tooltip").is_visible()
        hover(visit.page, plot, (33 - 1) / (40 - 1))
        assert plot.locator(".tooltip div").all_inner_texts()[2].startswith("validation at 30")
        visit.page.mouse.move(2, 2)
        assert not visit.page.locator(".cursor:visible").count()


def test_script_writes_numbers_as_the_page_does(browser, reports, tmp_path):
    values = [0.0, *(9.87e7 / 7.3**i for i in range(12)), 0.4, 59.4, 59.6, 61.0, 3599.6, 999.4, 1000.0]
    values = [float(f"{value:.6g}") for value in values]
    series = {unit: Series(list(range(1, len(values) + 1)), list(values)) for unit in ("number", "count", "seconds")}
    series["share"] = Series(series["number"].updates, [value / 1e8 for value in values])
    series["bytes"] = Series(series["number"].updates, [value * 1e4 for value in values])
    book = ChartBook()
    figures = "".join(book.curve(unit, [Line("x", held)], unit=unit) for unit, held in series.items())
    source = reports["promoted"].read_text()
    start, end = source.index("<body>") + 6, source.index('<script type="application/json"')
    data_end = source.index("</script>", end)
    page = source[:start] + figures + '<script type="application/json" id="charts">' + json.dumps(book.data)
    (tmp_path / "numbers.html").write_text(page + source[data_end:])
    with Visit(browser) as visit:
        visit.page.goto((tmp_path / "numbers.html").as_uri())
        for unit, held in series.items():
            shown = plot_of(visit.page, unit).evaluate(STEP_THROUGH, len(held.values))
            assert shown == [written(float(f"{value:.6g}"), unit) for value in held.values]
        assert visit.said == []


def test_keyboard_moves_through_the_updates_and_is_spoken(browser, reports):
    with Visit(browser) as visit:
        visit.page.goto(reports["promoted"].as_uri())
        plot = plot_of(visit.page, "Validation accuracy")
        assert plot.get_attribute("role") == "slider"
        assert plot.get_attribute("aria-label").startswith("Validation accuracy, updates 5 to 40")
        plot.press("Home")
        plot.press("ArrowRight")
        assert plot.locator(".tooltip .at").inner_text() == "update 10"
        assert plot.get_attribute("aria-valuenow") == "10"
        assert plot.get_attribute("aria-valuetext") == "update 10: validation 68.3%"
        plot.press("Escape")
        assert not plot.locator(".tooltip").is_visible()


def test_finger_shows_values_and_stays_inside_the_phone(browser, reports):
    with Visit(browser, NARROW, has_touch=True, is_mobile=True) as visit:
        visit.page.goto(reports["long"].as_uri())
        plot = plot_of(visit.page, "Reward")
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        for share in (0.02, 0.5, 0.98):
            visit.page.touchscreen.tap(box["x"] + box["width"] * share, box["y"] + 30)
            tooltip = plot.locator(".tooltip").bounding_box()
            assert tooltip["x"] >= 0
            assert tooltip["x"] + tooltip["width"] <= NARROW
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= NARROW


def test_sandboxed_frame_shows_the_whole_report(browser, reports):
    with Visit(browser) as visit:
        visit.page.set_content('<iframe sandbox="allow-scripts" style="width:900px;height:800px"></iframe>')
        visit.page.evaluate("html => document.querySelector('iframe').srcdoc = html", reports["promoted"].read_text())
        frame = visit.page.frame_locator("iframe")
        plot = plot_of(frame, "Reward")
        plot.press("End")
        assert plot.locator(".tooltip .at").inner_text() == "update 40"
        frame.get_by_role("link", name="Lineage").click()
        playwright_api.expect(frame.get_by_role("heading", name="Lineage")).to_be_in_viewport(timeout=PATIENCE)
        assert visit.said == []
        assert [url for url in visit.asked if not url.startswith("about:")] == []


def test_completion_that_attacks_is_shown_as_text(browser, reports):
    with Visit(browser) as visit:
        visit.page.goto(reports["promoted"].as_uri())
        assert visit.page.get_by_text(ATTACK).first.is_visible()
        assert visit.page.locator("img").count() == 0
        assert visit.page.title().startswith("promoted: The candidate is better")


def test_script_that_slipped_through_would_not_run(browser, reports, tmp_path):
    source = reports["promoted"].read_text().replace("<main>", f"<main>{ATTACK}", 1)
    (tmp_path / "attacked.html").write_text(source)
    with Visit(browser) as visit:
        visit.page.goto((tmp_path / "attacked.html").as_uri())
        assert visit.page.locator("main img").count() == 1
        assert visit.page.title() != "owned"
        assert any("Content Security Policy" in line for line in visit.said)


def test_failed_run_shows_where_and_why_first(browser, reports):
    with Visit(browser, NARROW) as visit:
        visit.page.goto(reports["failed"].as_uri())
        assert visit.page.get_by_role("heading", level=1).inner_text() == "The run failed in lora_rl"
        assert visit.page.get_by_role("alert").bounding_box()["y"] < 500
        assert visit.page.locator(".step.failed .step-name").inner_text() == "lora_rl"


def test_printing_opens_what_is_folded(browser, reports):
    with Visit(browser) as visit:
        visit.page.goto(reports["promoted"].as_uri())
        folded = "document.querySelectorAll('details:not([open])').length"
        before = visit.page.evaluate(folded)
        assert before > 5
        visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert visit.page.evaluate(folded) == 0
        visit.page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert visit.page.evaluate(folded) == before
        assert visit.page.pdf().startswith(b"%PDF")


def test_long_run_is_small(reports):
    assert reports["long"].stat().st_size < MAX_BYTES
