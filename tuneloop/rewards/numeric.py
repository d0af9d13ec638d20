"""Numeric match: the completion's last number is the answer."""

import decimal
import re
from decimal import Decimal
from typing import TYPE_CHECKING

from tuneloop.rewards.base import CannotJudge, Reward
from tuneloop.settings import RewardSettings

if TYPE_CHECKING:
    from tuneloop.data.schema import Example

RELATIVE_TOLERANCE = Decimal("1e-6")

_LATEX = (  # spellings that LaTeX gives to plain numbers -> plain text
    (re.compile(r"(?<=\d)\s*(?=\\[dt]?frac)"), " "),  # 2\frac{1}{2} ends in 1/2, not in 21/2
    (re.compile(r"\\[dt]?frac\s*\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}"), r"\1/\2 "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!;: ]|\\text\s*|\\left|\\right"), ""),
    (re.compile(r"\\(?=[$%])"), ""),
    (re.compile("[−–]"), "-"),  # minus sign and dash
)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A sign belongs to the number unless something that ends a term stands before it: "5-3" ends in 3, "= -3" in -3.
_NUMBER = re.compile(
    rf"(?P<sign>(?<![\w.)\]}}$%])[-+])?(?:\$\s?)?(?P<inner>(?<=\$)-)?(?P<number>{_DIGITS})(?P<exponent>[eE][-+]?\d{{1,3}}(?!\d))?"
    rf"(?:\s?/\s?(?P<below>{_DIGITS}))?"
)
_BOXED = re.compile(r"\\boxed\s*\{")
_CONTEXT = decimal.Context(prec=60)


def build(settings: RewardSettings) -> Reward:
    """The reward that `settings` describe; a numeric match has no options."""
    return numeric_match


def numeric_match(example: "Example", completion: str) -> float:
    r"""1.0 if the completion's number equals the answer's, else 0.0.

    The number is the last one in the last `\boxed{…}`; without a box, the first one after the last `####`; without
    either, the last one of the text. Thousands commas, signs, decimals, exponents, fractions (`3/4`, `\frac{3}{4}`),
    and `$` and `%` are understood; the two symbols are dropped and do not scale (50 % equals 50). Whole numbers must
    be equal, others agree within a relative 1e-6.

    Raises:
        CannotJudge: the answer holds no number.
    """
    expected = last_number(example.answer)
    if expected is None:
        raise CannotJudge(f"its answer {example.answer[:80]!r} holds no number; use an exact or symbolic reward")
    found = last_number(completion)
    return float(found is not None and _equal(found, expected))


def last_number(text: str) -> Decimal | None:
    """The number that a text ends in, as `numeric_match` reads it; None if there is none."""
    boxed = _last_box(text)
    if boxed is not None:
        text = boxed
    elif "####" in text:
        after = _numbers(text.rpartition("####")[2])
        return after[0] if after else None
    found = _numbers(text)
    return found[-1] if found else None


def _last_box(text: str) -> str | None:
    starts = list(_BOXED.finditer(text))
    if not starts:
        return None
    begin = starts[-1].end()
    depth = 1
    for index in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if not depth:
            return text[begin:index]
    return text[begin:]


def _numbers(text: str) -> list[Decimal]:
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    values = (_value(match) for match in _NUMBER.finditer(text))
    return [value for value in values if value is not None]


def _value(match: re.Match[str]) -> Decimal | None:
    value = Decimal(match["number"].replace(",", "") + (match["exponent"] or ""))
    if match["below"]:
        below = Decimal(match["below"].replace(",", ""))
        if not below:
            return None
        value = _CONTEXT.divide(value, below)
    negative = (match["sign"] or "").startswith("-") or match["inner"]
    return value.copy_negate() if negative else value


def _equal(found: Decimal, expected: Decimal) -> bool:
    if found == found.to_integral_value() and expected == expected.to_integral_value():
        return found == expected
    return _CONTEXT.subtract(found, expected).copy_abs() <= _CONTEXT.multiply(RELATIVE_TOLERANCE, expected.copy_abs())
