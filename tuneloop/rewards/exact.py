"""Exact match: the completion is the answer, character by character."""

import unicodedata
from typing import TYPE_CHECKING

from tuneloop.rewards.base import Reward
from tuneloop.settings import RewardSettings

if TYPE_CHECKING:
    from tuneloop.data.schema import Example


def build(settings: RewardSettings) -> Reward:
    """The reward that `settings` describe; an exact match has no options."""
    return exact_match


def exact_match(example: "Example", completion: str) -> float:
    """1.0 if completion and answer are equal, else 0.0.

    Surrounding white space is ignored and Unicode is compared in NFC, so that two spellings of the same text are
    equal. Case and inner white space count: where they should not, normalise the answers or use a python reward.
    """
    return float(_normalised(completion) == _normalised(example.answer))


def _normalised(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())
