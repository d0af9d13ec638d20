"""Stopping a training loop between two updates when somebody asks for it."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

REPEAT_SECONDS = 2.0  # a terminal and a parent process may both pass one Ctrl-C on: that is one request to stop


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; one that comes later acts at once.

    The loop looks at `requested` after each update, saves, and ends with `TryAgain`. Outside the main thread, where
    Python delivers no signals, nothing is ever requested.
    """

    def __init__(self) -> None:
        self.requested = False
        self._asked_at = 0.0
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)  # type: ignore[assignment]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self._asked_at = True, time.monotonic()
        elif time.monotonic() - self._asked_at > REPEAT_SECONDS:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
