"""Progress that a person can read: a bar on a terminal, plain lines with an ETA in a pod's log."""

import sys
import time
from types import TracebackType
from typing import TextIO


class Progress:
    """Counts towards a total (0: nobody knows it). Use as a context manager.

    On a terminal the line is redrawn in place; elsewhere a line is printed at most every `every` seconds.
    """

    def __init__(self, label: str, total: int, *, done: int = 0, every: float = 10.0, stream: TextIO | None = None):
        self.label, self.total, self.done = label, total, done
        self._start_done, self._started = done, time.monotonic()
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._every = 0.1 if self._terminal else every
        self._last = float("-inf")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._terminal and self._last > float("-inf"):
            self._stream.write("\n")
            self._stream.flush()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Record `count` more done; `note` is shown behind (a loss, a reward)."""
        self.done += count
        now = time.monotonic()
        if now - self._last < self._every and (self.done < self.total or not self.total):
            return
        self._last = now
        elapsed, made = now - self._started, self.done - self._start_done
        left = elapsed / made * (self.total - self.done) if made else 0.0
        share = self.done / self.total if self.total else 1.0
        counted = f"{self.done}/{self.total}" if self.total else f"{self.done}"
        text = f"{self.label} {counted}"
        if self._terminal:
            filled = int(share * 24) if self.total else 0
            text = f"\r{self.label} [{'█' * filled}{'·' * (24 - filled)}] {counted}"
        text += f"  {_clock(elapsed)} gone" + (f", {_clock(left)} left" if self.total else "")
        text += f"  {note}" if note else ""
        self._stream.write(text + ("\x1b[K" if self._terminal else "\n"))
        self._stream.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
