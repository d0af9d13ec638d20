"""Rendering many prompts: the chat template runs once a conversation shape, and texts are put into its result."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tuneloop.data.chat import prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SLOT = "tuneloop{}slot"
_VERIFIED_ROWS = 64  # of each shape are rendered both ways
_MAX_SHAPES = 1024


class PromptTemplate:
    """Renders prompts given as parallel roles and contents, several times faster than the template itself.

    A shape is the roles and the system messages. Its first rows are rendered by the template too, and a shape that
    differs anywhere is left to the template for good. So is every text that templates are known to look into: with
    white space at an end (often trimmed) or with `<` (reasoning and tool tags).

    Args:
        tokenizer: has a chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._tokenizer = tokenizer
        self._shapes: dict[tuple[str, ...], _Shape] = {}

    def render(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        """The text that `tuneloop.data.chat.prompt_text` gives for these messages.

        Raises:
            UserError: the template refuses these messages.
        """
        texts, key = [], list(roles)
        for role, content in zip(roles, contents, strict=True):
            if role == "system":
                key.append(content)
            elif "<" in content or content != content.strip():
                return self._by_template(roles, contents)
            else:
                texts.append(content)
        shape = self._shapes.get(tuple(key))
        if shape is None:
            if len(self._shapes) == _MAX_SHAPES:
                return self._by_template(roles, contents)
            shape = self._shapes[tuple(key)] = self._learn(roles, contents)
        if not shape.pieces:
            return self._by_template(roles, contents)
        rendered = shape.fill(texts)
        if shape.verified < _VERIFIED_ROWS:
            shape.verified += 1
            expected = self._by_template(roles, contents)
            if rendered != expected:
                shape.pieces = []
            return expected
        return rendered

    def _by_template(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)]
        return prompt_text(self._tokenizer, messages)

    def _learn(self, roles: Sequence[str], contents: Sequence[str]) -> "_Shape":
        slots = [_SLOT.format(index) for index in range(len(roles))]
        texts = [text if role == "system" else slot for role, text, slot in zip(roles, contents, slots, strict=True)]
        rest, pieces = self._by_template(roles, texts), []
        for role, slot in zip(roles, slots, strict=True):
            if role == "system":
                continue
            before, found, rest = rest.partition(slot)
            if not found or slot in rest:
                return _Shape([])
            pieces.append(before)
        return _Shape([*pieces, rest])


class _Shape:
    """What the template writes before, between and behind the texts; no pieces: only the template knows."""

    def __init__(self, pieces: list[str]):
        self.pieces, self.verified = pieces, 0

    def fill(self, texts: list[str]) -> str:
        parts = [self.pieces[0]]
        for text, piece in zip(texts, self.pieces[1:], strict=True):
            parts += (text, piece)
        return "".join(parts)
