"""The head of the page: what came of the run, in one sentence, one number and the gate's checks."""

from tuneloop.report.comparison import METRIC_NAMES, Comparison, comparisons, interval_name, score
from tuneloop.report.html import Html, join, tag
from tuneloop.report.number import count, duration, p_value, percent, points
from tuneloop.report.run_record import RunRecord, StepRecord, dig
from tuneloop.report.series import read_series

EXIT_MEANINGS = {
    2: "Something in the request must change before it can work; the line says what.",
    75: "Nothing is wrong with the request: the same command continues where it can.",
}
STATE_MARKS = {"done": "✓", "failed": "✗", "refused": "–", "skipped": "–", "unfinished": "…", "not reached": ""}


def verdict(run: RunRecord) -> Html:
    """The page's header section."""
    made = comparisons(run)
    main = made[0] if made else None
    return tag(
        "header",
        _title_line(run),
        tag("p", _pill(run), cls="pill-line"),
        tag("h1", headline(run)),
        tag("p", lead(run, main), cls="lead") if lead(run, main) else None,
        _error_box(run),
        tag("div", _numbers(run, main), _gate(run), cls="outcome") if main or run.evaluation.get("gate") else None,
        _step_strip(run),
        cls="verdict",
    )


def headline(run: RunRecord) -> str:
    """The outcome in one sentence."""
    if run.failure:
        verb = "stopped" if _only_stopped(run) else "failed"
        step = run.steps.get(run.failure.step or "")
        where = f" {'before' if step.state == 'not reached' else 'in'} {step.name}" if step else ""
        return f"The run {verb}{where}"
    if run.status == "promoted":
        version = dig(run.promotion, "version")
        return "The candidate is better, and is now " + (f"version {version}" if version else "in production")
    if run.status == "skipped":
        return "Nothing new to train on"
    return "The candidate was not promoted"


def lead(run: RunRecord, main: Comparison | None) -> str:
    """The measured difference in words; empty without an evaluation."""
    if run.status == "skipped":
        return "The data is what the incumbent was trained on, so the run ended before it asked for a GPU."
    if not main:
        return ""
    name = METRIC_NAMES.get(main.metric, main.metric)
    ours, theirs = score(run, "candidate", main.metric), score(run, main.reference, main.metric)
    more = "more" if main.difference >= 0 else "fewer"
    words = {"accuracy": "correctly, with its most likely answer", "pass@1": "correctly, when it samples"}
    return (
        f"On {count(main.prompts)} held-out prompts the candidate answers {percent(ours.get('value'))} "
        f"{words.get(name, f'by {name}')}: {points(abs(main.difference)).lstrip('+')} points {more} than the "
        f"{main.reference}, {percent(theirs.get('value'))}."
    )


def _title_line(run: RunRecord) -> Html:
    scenario, base = dig(run.config, "name"), dig(run.config, "model", "uri")
    parts = [tag("strong", run.name)]
    parts += [tag("span", f"{scenario} scenario")] if scenario and scenario != run.name else []
    parts += [tag("span", base)] if base else []
    if run.finished_at:
        parts.append(tag("time", run.finished_at.replace("T", " ").replace("Z", " UTC"), datetime=run.finished_at))
    return tag("p", parts, cls="title-line")


def _pill(run: RunRecord) -> Html:
    if run.failure:
        return tag("span", "✗ Stopped" if _only_stopped(run) else "✗ Failed", cls="pill bad")
    if run.status == "promoted":
        return tag("span", "✓ Promoted", cls="pill good")
    if run.status == "skipped":
        return tag("span", "– Skipped", cls="pill kept")
    has_incumbent = bool(score(run, "incumbent")) or dig(run.promotion, "previous_version")
    return tag("span", "– Kept the incumbent" if has_incumbent else "– Nothing promoted", cls="pill kept")


def _only_stopped(run: RunRecord) -> bool:
    step = run.steps.get(run.failure.step or "") if run.failure else None
    return step is None or step.state in ("unfinished", "not reached")


def _error_box(run: RunRecord) -> Html | None:
    failure = run.failure
    if not failure:
        return None
    parts = [tag("p", tag("code", failure.message), cls="error-line")]
    reached = _progress_of(run, failure.step)
    told = [reached, EXIT_MEANINGS.get(failure.exit_code or 0, "")]
    told += [f"Exit code {failure.exit_code}."] if failure.exit_code is not None else []
    sentence = " ".join(part for part in told if part)
    return tag("div", parts, tag("p", sentence) if sentence else None, cls="error-box", role="alert")


def _progress_of(run: RunRecord, step: str | None) -> str:
    record = run.steps.get(step or "")
    if not record or not record.folder:
        return ""
    last = max((s.updates[-1] for s in read_series(record.folder / "metrics.jsonl").values()), default=None)
    planned = dig(run.config, record.name, "updates")
    if last is None:
        return ""
    return f"It had completed update {count(last)}{f' of {count(planned)}' if planned else ''}."


def _numbers(run: RunRecord, main: Comparison | None) -> Html | None:
    if not main:
        return None
    interval = f"{points(main.interval[0])} to {points(main.interval[1])}" if main.interval else "—"
    facts = [
        (interval_name(run), interval),
        ("p-value", p_value(main.p_value)),
        ("prompts", count(main.prompts)),
        ("won and lost", f"{count(main.wins)} and {count(main.losses)}"),
    ]
    return tag(
        "div",
        tag(
            "p",
            tag("span", points(main.difference), cls="figure"),
            tag("span", f" points against the {main.reference}", cls="figure-unit"),
            cls="headline-number",
        ),
        tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts], cls="facts"),
        cls="numbers",
    )


def _gate(run: RunRecord) -> Html | None:
    gate = dig(run.evaluation, "gate")
    if not gate:
        return None
    checks = [
        tag(
            "li",
            tag("span", "✓" if check.get("passed") else "✗", cls="mark", aria_hidden="true"),
            tag("span", "passed: " if check.get("passed") else "failed: ", cls="visually-hidden"),
            tag("span", tag("b", check.get("name", "")), " ", tag("span", check.get("detail", ""), cls="quiet")),
            cls="good" if check.get("passed") else "bad",
        )
        for check in gate.get("checks") or []
    ]
    told = "The gate passed" if gate.get("passed") else "The gate refused"
    return tag(
        "section",
        tag("h2", told),
        tag("p", _sentence(gate.get("reason") or "")),
        tag("ul", checks, cls="checks") if checks else None,
        cls="gate",
        aria_label="gate",
    )


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _step_strip(run: RunRecord) -> Html:
    items = [_step_item(record) for record in run.steps.values()]
    return tag("ol", join(items), cls="steps", aria_label="steps of the run")


def _step_item(record: StepRecord) -> Html:
    state = record.state
    told = {"done": duration(record.seconds), "refused": "kept out by the gate"}.get(state, state)
    return tag(
        "li",
        tag("span", STATE_MARKS[state], cls="mark", aria_hidden="true"),
        tag("span", record.name, cls="step-name"),
        tag("span", told, cls="quiet"),
        cls=f"step {state.replace(' ', '-')}",
    )
