"""Held-out answers that the candidate changed: what it won and what it lost against the reference."""

from typing import Any

from tuneloop.report.accuracy import NAMES, model_mark
from tuneloop.report.comparison import comparisons
from tuneloop.report.html import Html, tag
from tuneloop.report.number import count
from tuneloop.report.run_record import RunRecord
from tuneloop.report.samples import clip, prompt_text
from tuneloop.report.table import cell, head_cell, row, table

GREEDY = -1  # the `sample` of the most likely answer


def answers(run: RunRecord, *, shown: int = 6, characters: int = 400) -> Html | None:
    """The section; None before the evaluation, or when nothing changed.

    Args:
        shown: how many won, and how many lost, prompts are shown at most.
        characters: where a long prompt or answer is cut.
    """
    evaluated, made = run.steps["evaluate"].folder, comparisons(run)
    if not evaluated or not made or not (evaluated / "answers.parquet").is_file():
        return None
    reference = made[0].reference
    ours, theirs = _greedy(run, "candidate"), _greedy(run, reference)
    both = sorted(set(ours) & set(theirs))
    won = [name for name in both if ours[name]["correct"] and not theirs[name]["correct"]]
    lost = [name for name in both if theirs[name]["correct"] and not ours[name]["correct"]]
    if not won and not lost:
        return None
    prompts = _prompts(run, {*won[:shown], *lost[:shown]})

    def part(title: str, names: list[str]) -> Html | None:
        heads = ("Prompt", "Answer", NAMES.get(reference, reference), "Candidate")
        rows = [_row(prompts.get(name, {}), theirs[name], ours[name], heads, characters) for name in names[:shown]]
        drawn = tag("div", tag("h3", f"{title}: {count(len(names))}"), table(title, heads, rows, "cards answers"))
        return drawn if names else None

    return tag(
        "section",
        tag("h2", "Answers that changed"),
        tag("p", "Held-out prompts that only one of ", model_mark("candidate"), " and ", model_mark(reference),
            " answers correctly, most likely answers.", cls="note"),
        part("Lost", lost),
        part("Won", won),
        id="answers",
    )  # fmt: skip


def _greedy(run: RunRecord, model: str) -> dict[str, dict[str, Any]]:
    import pyarrow.parquet as pq

    folder = run.steps["evaluate"].folder
    assert folder is not None
    columns = ["prompt_id", "completion", "correct"]
    wanted = [("model", "=", model), ("sample", "=", GREEDY)]
    rows = pq.read_table(folder / "answers.parquet", columns=columns, filters=wanted).to_pylist()
    return {row["prompt_id"]: row for row in rows}


def _prompts(run: RunRecord, names: set[str]) -> dict[str, dict[str, Any]]:
    import pyarrow.parquet as pq

    folder = run.steps["data_prep"].folder
    if not folder or not (folder / "test.parquet").is_file():
        return {}
    table = pq.read_table(folder / "test.parquet", columns=["id", "messages", "answer"], filters=[("id", "in", names)])
    return {row["id"]: row for row in table.to_pylist()}


def _row(
    prompt: dict[str, Any], theirs: dict[str, Any], ours: dict[str, Any], heads: tuple[str, ...], characters: int
) -> Html:
    asked = clip(prompt_text(prompt.get("messages") or theirs["prompt_id"]), characters)
    answer = clip(prompt.get("answer") or "", characters)
    return row(
        head_cell(tag("span", asked, cls="said", dir="auto")),
        cell(tag("span", answer, cls="said", dir="auto"), label=heads[1]),
        [_answer(given, label, characters) for given, label in zip((theirs, ours), heads[2:], strict=True)],
    )


def _answer(given: dict[str, Any], label: str, characters: int) -> Html:
    right = bool(given["correct"])
    mark = tag("span", "✓" if right else "✗", cls="mark", aria_hidden="true")
    told = tag("span", "correct: " if right else "incorrect: ", cls="visually-hidden")
    said = tag("span", clip(given["completion"], characters), cls="said", dir="auto")
    return cell(mark, told, said, cls="good" if right else "bad", label=label)
