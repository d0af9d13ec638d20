"""Bad rows: kept apart for the user to repair, and too many of them are a mistake."""

import json
import os
from pathlib import Path
from types import TracebackType

from tuneloop.errors import UserError

TEXT_CHARACTERS = 500


class Quarantine:
    """Writes `quarantine.jsonl`. Use as a context manager: on an error nothing is left.

    Args:
        folder: where the file goes; it appears under its name when it is complete.
    """

    def __init__(self, folder: Path):
        self.count, self._first = 0, ""
        self._target = folder / "quarantine.jsonl"
        self._temporary = folder / ".quarantine.jsonl.tmp"
        self._file = self._temporary.open("w", encoding="utf-8")

    def __enter__(self) -> "Quarantine":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def add(self, source: str, line: int, reason: str, text: str) -> None:
        """Set a bad row aside."""
        self.count += 1
        self._first = self._first or f"{source} line {line}: {reason}"
        entry = {"source": source, "line": line, "reason": reason, "text": text[:TEXT_CHARACTERS]}
        self._file.write(json.dumps(entry) + "\n")

    def check(self, read: int, share: float) -> None:
        """Refuse more bad rows than `share` of those read.

        Raises:
            UserError: names the first bad row and its reason.
        """
        if self.count > share * read:
            raise UserError(
                f"{self._first}; {self.count:,} of {read:,} rows are bad, more than data_prep.quarantine_share = "
                f"{share:g} allows: repair them, or raise it to leave them out"
            )

    def finish(self) -> None:
        """Complete the file and give it its name."""
        self._file.close()
        os.replace(self._temporary, self._target)
