"""Rows from records with columns: a prompt (text or messages), an answer, perhaps a completion."""

import json
from collections.abc import Collection, Mapping
from typing import Any

from tuneloop.data.record import BadRow, Row, lookup

ROLES = ("system", "user", "assistant", "tool")


class ColumnParser:
    """Reads a row from named columns.

    Optional columns `reward_kind` (a string) and `metadata` (an object) are carried over.

    Args:
        prompt: column with a string, or with a list of `{"role", "content"}` messages.
        answer: column with what rewards compare with; numbers are written as text.
        completion: column with what SFT imitates; empty: the answer.
        template: the user's message; `{prompt}` stands for the prompt, or for the last user message of a list.
        system_prompt: becomes the first message of every prompt that has no system message of its own.
        reward_kinds: what the `reward_kind` column may say.
    """

    def __init__(
        self,
        prompt: str = "prompt",
        answer: str = "answer",
        completion: str = "",
        template: str = "{prompt}",
        system_prompt: str = "",
        reward_kinds: Collection[str] = (),
    ):
        self._reward_kinds = reward_kinds
        self.prompt, self.answer, self.completion = prompt, answer, completion
        self.columns = {prompt: "prompt_column", answer: "answer_column"}
        if completion:
            self.columns[completion] = "completion_column"
        self.conversation = Conversation(template, system_prompt)

    def __call__(self, value: Mapping[str, Any]) -> Row:
        roles, contents = self.conversation.messages(lookup(value, self.prompt))
        answer = scalar_text(lookup(value, self.answer), "answer")
        completion = scalar_text(lookup(value, self.completion), "completion") if self.completion else answer
        metadata = value.get("metadata")
        return Row(
            roles,
            contents,
            answer,
            completion,
            reward_kind=self._reward_kind(value.get("reward_kind")),
            metadata=json.dumps(metadata, default=str) if isinstance(metadata, Mapping) else "{}",
        )

    def _reward_kind(self, kind: Any) -> str:
        if not kind:
            return ""
        if kind not in self._reward_kinds:
            raise BadRow(f"reward_kind is {kind!r}, but the task's rewards are {', '.join(self._reward_kinds)}")
        return kind


class Conversation:
    """Makes a prompt's messages: applies the template, puts the system prompt in front."""

    def __init__(self, template: str = "{prompt}", system_prompt: str = ""):
        self._before, _, self._after = template.partition("{prompt}")
        self._system = system_prompt

    def messages(self, prompt: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Roles and contents of a prompt given as a string or as a list of messages.

        Raises:
            BadRow: missing, empty, of the wrong type, or ending with an assistant message.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise BadRow("the prompt is empty")
            text = f"{self._before}{prompt}{self._after}"
            return (("system", "user"), (self._system, text)) if self._system else (("user",), (text,))
        if prompt is None:
            raise BadRow("the prompt is missing")
        if not isinstance(prompt, list):
            raise BadRow(f"the prompt is a {type(prompt).__name__}, expected a string or a list of messages")
        return self._from_list(prompt)

    def _from_list(self, prompt: list[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if not prompt:
            raise BadRow("the prompt is empty")
        roles, contents = [], []
        for message in prompt:
            role, content = _message(message)
            roles.append(role)
            contents.append(content)
        if roles[-1] == "assistant":
            raise BadRow("the prompt ends with an assistant message, so nothing is left to answer")
        if "user" in roles:
            last = len(roles) - 1 - roles[::-1].index("user")
            contents[last] = f"{self._before}{contents[last]}{self._after}"
        if self._system and "system" not in roles:
            roles.insert(0, "system")
            contents.insert(0, self._system)
        return tuple(roles), tuple(contents)


def _message(message: Any) -> tuple[str, str]:
    if not isinstance(message, Mapping):
        raise BadRow(f"a message is a {type(message).__name__}, expected an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise BadRow(f"a message has role {role!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str) or (role == "user" and not content.strip()):
        raise BadRow(f"a {role} message has no text")
    more = [str(key) for key, value in message.items() if key not in ("role", "content") and value]
    if more:
        raise BadRow(f"a message has {', '.join(more)}; only role and content can be kept")
    return role, content


def scalar_text(value: Any, name: str) -> str:
    """A string or number as text.

    Raises:
        BadRow: missing, empty, or of another type.
    """
    if isinstance(value, str):
        if not value.strip():
            raise BadRow(f"the {name} is empty")
        return value
    if value is None:
        raise BadRow(f"the {name} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"the {name} is a {type(value).__name__}, expected a string or a number")
    return str(value)
