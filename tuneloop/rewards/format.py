"""Format: the whole completion matches a regular expression."""

import re
from typing import TYPE_CHECKING

from tuneloop.errors import UserError
from tuneloop.rewards.base import Reward
from tuneloop.settings import RewardSettings

if TYPE_CHECKING:
    from tuneloop.data.schema import Example


def build(settings: RewardSettings) -> Reward:
    """A reward of 1.0 where `settings.pattern` matches the completion from its first to its last character.

    Flags go into the pattern: `(?s)` lets a dot match line breaks, `(?i)` ignores case.

    Raises:
        UserError: the pattern is not a regular expression.
    """
    try:
        pattern = re.compile(settings.pattern)
    except re.error as error:
        raise UserError(
            f"reward {settings.name!r}: pattern {settings.pattern!r} is not a regular expression ({error})"
        ) from None

    def matches(example: "Example", completion: str) -> float:
        return float(pattern.fullmatch(completion) is not None)

    return matches
