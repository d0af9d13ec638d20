"""Procedural tasks with verifiable answers from the reasoning-gym package."""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from tuneloop.data.columns import Conversation
from tuneloop.data.record import BadRow, Record, Row
from tuneloop.errors import UserError


class ReasoningGymSource:
    """Rows of one task, made on the fly: row `i` is a pure function of (task, seed, options, i).

    The scorer's whole entry travels in the row's metadata.

    Args:
        task: the data set's name, such as `chain_sum`.
        size: rows to make.
        seed: of the generator.
        options: the data set's own parameters.
        template: the user's message; `{prompt}` stands for the question.
        system_prompt: becomes the first message when not empty.
        reward_kind: of every row.
    """

    unit = "rows"

    def __init__(
        self,
        task: str,
        size: int,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
        template: str = "{prompt}",
        system_prompt: str = "",
        reward_kind: str = "reasoning_gym",
    ):
        self.name, self.total, self.consumed = f"reasoning_gym:{task}", size, 0
        self.parser = EntryParser(Conversation(template, system_prompt), reward_kind)
        self._dataset = _create(task, size, seed, dict(options or {}))

    def records(self) -> Iterator[Record]:
        """Every generated entry, as in `Source.records`."""
        for index in range(self.total):
            self.consumed = index + 1
            yield Record(index + 1, self._dataset[index])


class EntryParser:
    """Makes a row of a reasoning-gym entry (`question`, `answer`, `metadata`)."""

    columns: Mapping[str, str] = {"question": "", "answer": ""}

    def __init__(self, conversation: Conversation, reward_kind: str):
        self._conversation, self._reward_kind = conversation, reward_kind

    def __call__(self, value: Mapping[str, Any]) -> Row:
        roles, contents = self._conversation.messages(value["question"])
        answer = value["answer"]
        if not isinstance(answer, str) or not answer.strip():
            raise BadRow("the task gives no answer to imitate or compare with")
        return Row(roles, contents, answer, answer, self._reward_kind, json.dumps(value))


def _create(task: str, size: int, seed: int, options: dict[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(f"reasoning_gym has no task {task!r}; {_nearest(task, list(DATASETS))}")
    known = [field.name for field in dataclasses.fields(DATASETS[task][1]) if field.name not in ("size", "seed")]
    for option in options:
        if option not in known:
            raise UserError(f"reasoning_gym task {task!r} has no option {option!r}; {_nearest(option, known)}")
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
    except (AssertionError, TypeError, ValueError) as error:  # its configs check their values by assert
        raise UserError(f"reasoning_gym task {task!r} refuses its options: {error or 'out of bounds'}") from None


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"
