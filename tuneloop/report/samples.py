"""Completions of the same prompts over training, side by side."""

from typing import Any

from tuneloop.report.html import Html, tag
from tuneloop.report.number import count, finite, plain
from tuneloop.report.run_record import RunRecord, dig, read_lines

COLUMNS = 6  # updates shown: the first, the last, and others evenly between


def samples(run: RunRecord, *, prompts: int = 8, characters: int = 700) -> Html | None:
    """The section; None when no samples were kept.

    Args:
        prompts: how many prompts are shown at most.
        characters: where a long prompt or completion is cut.
    """
    folder = run.steps["lora_rl"].folder
    by_prompt: dict[str, dict[int, dict[str, Any]]] = {}
    for row in read_lines(folder / "samples.jsonl") if folder else ():
        name = str(row.get("prompt_id"))
        if isinstance(row.get("update"), int) and (name in by_prompt or len(by_prompt) < prompts):
            by_prompt.setdefault(name, {})[row["update"]] = row
    if not by_prompt:
        return None
    updates = _spread(sorted({update for rows in by_prompt.values() for update in rows}))
    judge = dig(run.config, "task", "rewards", 0, "name")
    return tag(
        "section",
        tag("h2", "Completions over training"),
        tag("p", "The most likely answer to the same validation prompts, as the policy learned.", cls="note"),
        [_prompt(rows, updates, judge, characters) for rows in by_prompt.values()],
        id="samples",
    )


def clip(text: object, characters: int) -> str:
    """`text` cut at a length, saying how much is left out."""
    whole = str(text)
    if len(whole) <= characters:
        return whole
    return f"{whole[:characters]}… ({count(len(whole) - characters)} more characters)"


def prompt_text(prompt: object) -> str:
    """A prompt as plain text: a string, or the user's messages of a conversation."""
    if isinstance(prompt, list):
        spoken = [f"{dig(message, 'content')}" for message in prompt if dig(message, "role") == "user"]
        return "\n".join(spoken or [str(dig(message, "content")) for message in prompt])
    return str(prompt)


def _spread(updates: list[int]) -> list[int]:
    if len(updates) <= COLUMNS:
        return updates
    return [updates[round(i * (len(updates) - 1) / (COLUMNS - 1))] for i in range(COLUMNS)]


def _prompt(rows: dict[int, dict[str, Any]], updates: list[int], judge: str | None, characters: int) -> Html:
    first = next(iter(rows.values()))
    answer = first.get("answer")
    return tag(
        "article",
        tag(
            "div",
            tag("p", tag("span", "Prompt", cls="tag"), tag("span", clip(prompt_text(first.get("prompt")), characters),
                cls="said", dir="auto")),
            tag("p", tag("span", "Answer", cls="tag"), tag("span", clip(answer, characters), cls="said", dir="auto"))
            if answer not in (None, "") else None,
            cls="asked",
        ),
        tag("ol", [_completion(update, rows.get(update), judge, characters) for update in updates], cls="completions",
            tabindex=0, aria_label="completions by update"),
        cls="sample",
    )  # fmt: skip


def _completion(update: int, row: dict[str, Any] | None, judge: str | None, characters: int) -> Html:
    head = tag("span", f"update {count(update)}", cls="at")
    if row is None:
        return tag("li", tag("p", head), cls="completion")
    right = is_correct(row, judge)
    mark, word = ("✓", "correct") if right else ("✗", "wrong")
    judged = tag("span", tag("span", mark, aria_hidden="true"), " ", word, cls="judged")
    others = ", ".join(f"{name} {plain(value, 3)}" for name, value in (row.get("rewards") or {}).items())
    return tag(
        "li",
        tag("p", head, judged, cls="completion-head"),
        tag("pre", clip(row.get("completion", ""), characters) or " ", dir="auto"),
        tag("p", f"reward {plain(row.get('reward'), 3)}", cls="quiet reward", title=others or None),
        cls=f"completion {'good' if right else 'bad'}",
    )  # fmt: skip


def is_correct(row: dict[str, Any], judge: str | None) -> bool:
    """What the row says of itself, or else whether the reward that decides correctness gave full marks."""
    if isinstance(row.get("correct"), bool):
        return row["correct"]
    value = finite(dig(row, "rewards", judge)) if judge else None
    value = finite(row.get("reward")) if value is None else value
    return value is not None and value >= 1 - 1e-9
