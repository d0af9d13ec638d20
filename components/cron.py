"""Cron expressions of five fields: minute, hour, day of month, month, day of week."""

import re

from tuneloop.errors import UserError

_FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 6))
_NAMES = {
    "month": ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    "day of week": ("sun", "mon", "tue", "wed", "thu", "fri", "sat"),
}
_PART = re.compile(r"(?:\*|(?P<first>\w+)(?:-(?P<last>\w+))?)(?:/(?P<every>\d+))?", re.ASCII)


def check_cron(text: str) -> str:
    """The expression itself.

    Raises:
        UserError: a field is outside its bounds, or is none.
    """
    fields = text.split()
    if len(fields) != len(_FIELDS):
        raise UserError(f"cron {text!r}: expected 5 fields: minute, hour, day of month, month, day of week")
    for field, (name, low, high) in zip(fields, _FIELDS, strict=True):
        for part in field.split(","):
            _check_part(text, part, name, low, high)
    return text


def with_seconds(text: str) -> str:
    """Kubeflow's spelling, whose first field is the second."""
    return f"0 {text}"


def _check_part(text: str, part: str, name: str, low: int, high: int) -> None:
    match = _PART.fullmatch(part)
    if not match:
        raise UserError(f"cron {text!r}: {part!r} is no {name}")
    bounds = [_number(text, value, name, low, high) for value in (match["first"], match["last"]) if value]
    if bounds != sorted(bounds):
        raise UserError(f"cron {text!r}: {name} {part!r} ends before it begins")
    if match["every"] is not None and not 1 <= int(match["every"]) <= high:
        raise UserError(f"cron {text!r}: every {match['every']} is no step of a {name}")


def _number(text: str, value: str, name: str, low: int, high: int) -> int:
    names = _NAMES.get(name, ())
    if value.lower() in names:
        return names.index(value.lower()) + low
    if not value.isdigit() or not low <= int(value) <= high:
        hint = "; Sunday is 0" if name == "day of week" else ""
        raise UserError(f"cron {text!r}: {value!r} is no {name}, which is {low} to {high}{hint}")
    return int(value)
