"""What makes two prompts the same prompt: content ids, and the split that they decide.

An id is 32 hex digits, two halves of sha256 digests:

- the first 16 digits name the *content key*: all text but system messages, casefolded, without whitespace,
  punctuation and symbols. Prompts that differ in nothing else share it.
- the last 16 digits name the exact prompt: roles and texts, system message included, Unicode NFC, runs of whitespace
  as one space.

The split is a function of the content key alone. Therefore a row never changes its split when data is added or the
system prompt changes, and no prompt can stand in training and in evaluation spelled in two ways.
"""

import hashlib
import unicodedata
from collections.abc import Sequence

from tuneloop.data.schema import SPLITS

ID_DIGITS = 32
KEY_DIGITS = 16


class _KeepLettersAndDigits(dict[int, int | None]):
    """A translation table that deletes whatever is not a letter, a mark or a number."""

    def __missing__(self, code: int) -> int | None:
        kept = code if unicodedata.category(chr(code))[0] in "LMN" else None
        self[code] = kept
        return kept


_CONTENT_TABLE = _KeepLettersAndDigits()


def content_text(text: str) -> str:
    """`text` as the content key sees it: NFKC, casefolded, letters and digits only."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return text.casefold().translate(_CONTENT_TABLE)


def exact_text(text: str) -> str:
    """`text` as the exact half of an id sees it: NFC, runs of whitespace as one space, none at the ends."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def content_id(roles: Sequence[str], contents: Sequence[str]) -> str:
    """The id of a prompt.

    Args:
        roles: the role of each message.
        contents: the text of each message.

    Raises:
        UnicodeEncodeError: a text holds a lone surrogate, which no encoding can carry.
    """
    exact = "\x1e".join([f"{role}\x1f{exact_text(text)}" for role, text in zip(roles, contents, strict=True)])
    exact_digest = hashlib.sha256(exact.encode()).hexdigest()
    content = "\x1e".join([content_text(text) for role, text in zip(roles, contents, strict=True) if role != "system"])
    if not content.strip("\x1e"):  # a prompt of symbols alone: only its exact spelling tells it from others
        return exact_digest[:ID_DIGITS]
    return hashlib.sha256(content.encode()).hexdigest()[:KEY_DIGITS] + exact_digest[:KEY_DIGITS]


def split_of(row_id: str, test_share: float, validation_share: float) -> str:
    """The split of a row: its content key, read as a fraction in [0, 1), against the shares.

    Args:
        row_id: a content id.
        test_share: keys below this are `test`.
        validation_share: keys below `test_share + validation_share` are `validation`; all others `train`.
    """
    fraction = int(row_id[:KEY_DIGITS], 16) / 2**64
    if fraction < test_share:
        return SPLITS[2]
    return SPLITS[1] if fraction < test_share + validation_share else SPLITS[0]
