"""Reads the rows of a growing `metrics.jsonl`, which a resumed run cuts back before it grows again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Follower:
    """Gives each complete row of a file once it is there.

    Only the file is shared with whoever writes it, so it does not matter in which process or how often training starts.
    """

    def __init__(self, path: Path):
        self._path = path
        self._position = 0  # in bytes, behind the last line that was given
        self._last = b""

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that came since the last call, or all of them when the file was cut back meanwhile."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(max(0, self._position - len(self._last)))
            if file.read(len(self._last)) != self._last:
                self._position, self._last = 0, b""
            file.seek(self._position)
            while (line := file.readline()).endswith(b"\n"):
                self._position, self._last = self._position + len(line), line
                yield json.loads(line)
