"""The row that data preparation writes and every later step reads."""

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

Message = dict[str, str]

SPLITS = ("train", "validation", "test")

MESSAGE_TYPE = pa.struct(
    [pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string(), nullable=False)]
)

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("messages", pa.list_(MESSAGE_TYPE), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("reward_kind", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("completion_tokens", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Example:
    """One prepared row.

    Attributes:
        id: hex sha256 (first 32 digits) of the normalised prompt messages.
        messages: the prompt, system message included, as `{"role", "content"}` mappings.
        answer: what rewards compare with.
        completion: what SFT imitates.
        reward_kind: the reward that judges this row; empty means the task's first.
        source: `<kind>:<uri or task>`.
        metadata: for reasoning-gym rows the scorer's whole entry.
        prompt_tokens: tokens of the rendered prompt, generation prompt included.
        completion_tokens: tokens of the completion, end token included.
    """

    id: str
    messages: list[Message]
    answer: str
    completion: str
    reward_kind: str = ""
    source: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 0
    completion_tokens: int = 0


def schema_problem(schema: pa.Schema) -> str | None:
    """What keeps a file with this Arrow schema from being prepared data; None when nothing does.

    Nullability and additional columns are not looked at: other writers often leave them out.
    """
    missing = [name for name in SCHEMA.names if name not in schema.names]
    if missing:
        return f"lacks the columns {', '.join(missing)} (it has {', '.join(schema.names) or 'none'})"
    for expected in SCHEMA:
        actual = schema.field(expected.name).type
        if not _same_type(actual, expected.type):
            return f"column {expected.name!r} is {actual}, expected {expected.type}"
    return None


def _same_type(actual: pa.DataType, expected: pa.DataType) -> bool:
    if pa.types.is_struct(expected):
        return pa.types.is_struct(actual) and all(
            actual.get_field_index(field.name) >= 0 and _same_type(actual.field(field.name).type, field.type)
            for field in expected
        )
    if pa.types.is_list(expected):
        is_list = pa.types.is_list(actual) or pa.types.is_large_list(actual)
        return is_list and _same_type(actual.value_type, expected.value_type)
    if pa.types.is_string(expected):
        return pa.types.is_string(actual) or pa.types.is_large_string(actual)
    return actual == expected
