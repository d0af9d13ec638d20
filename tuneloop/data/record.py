"""What a source hands over: raw records, and the rows that they become."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class BadRow(Exception):
    """This record cannot become a row; the message is the reason that quarantine shows."""


class Record(NamedTuple):
    """One record of a source.

    Attributes:
        line: 1-based number of the line (or row) in its source.
        value: the parsed record; None when it could not be parsed.
        text: the record as it stands in the source, or "" when `value` says it all.
        problem: why `value` is None.
    """

    line: int
    value: Mapping[str, Any] | None
    text: str = ""
    problem: str = ""


@dataclass(slots=True)
class Row:
    """A well-formed row: the prompt as parallel roles and contents, and what belongs to it."""

    roles: tuple[str, ...]
    contents: tuple[str, ...]
    answer: str
    completion: str
    reward_kind: str = ""
    metadata: str = "{}"


class RowParser(Protocol):
    """Turns a record's value into a row."""

    @property
    def columns(self) -> Mapping[str, str]:
        """Dotted names of the columns that every record must have, with the setting that renames each."""
        ...

    def __call__(self, value: Mapping[str, Any]) -> Row:
        """The row of a record.

        Raises:
            BadRow: a column is missing, empty or of the wrong type.
        """
        ...


class Source(Protocol):
    """Where records come from.

    Contract: `records()` yields every record of the source in order, bad ones included, in memory that does not grow
    with their number; `consumed` of `total` (in `unit`) tells how far it has come, `total` is 0 when nobody knows.
    """

    @property
    def name(self) -> str:
        """`<kind>:<uri or task>`, as the rows' `source` column shows it."""
        ...

    @property
    def parser(self) -> RowParser:
        """Turns the records into rows."""
        ...

    @property
    def unit(self) -> str:
        """What progress counts."""
        ...

    @property
    def total(self) -> int:
        """Units in all."""
        ...

    @property
    def consumed(self) -> int:
        """Units read so far."""
        ...

    def records(self) -> Iterator[Record]:
        """All records, in order.

        Raises:
            UserError: the source is missing, empty, unreadable or of another kind.
            TryAgain: the storage or the hub cannot be reached.
        """
        ...


def lookup(value: Mapping[str, Any], name: str) -> Any:
    """The value of a column; a dotted name reaches into nested objects, None when there is no such column."""
    if name in value:
        return value[name]
    found: Any = value
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def has_column(value: Mapping[str, Any], name: str) -> bool:
    """Whether a record has the column, be its value null."""
    if name in value:
        return True
    head, dot, last = name.rpartition(".")
    parent = lookup(value, head) if dot else None
    return isinstance(parent, Mapping) and last in parent


def missing_column(values: Iterable[Mapping[str, Any]], parser: RowParser) -> str | None:
    """A column that the parser needs and that not one of the records has; None when there is none such."""
    values = list(values)
    if not values:
        return None
    return next((name for name in parser.columns if not any(has_column(value, name) for value in values)), None)
