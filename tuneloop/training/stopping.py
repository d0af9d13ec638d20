"""Stopping a training loop when somebody asks for it: behind the running update, or out of it when that takes too long.

Looked at after each update, a request costs nothing. An update that is not finished within the grace is abandoned by an
exception out of the signal handler, wherever it is: in a rollout, a reward, a validation. What it leaves half-done (the
model, the logs) is of no further use; `RunState` saves the state of the last finished update instead.
"""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

REPEAT_SECONDS = 2.0  # a terminal and a parent process may both pass one Ctrl-C on: that is one request to stop
INSIST_SECONDS = 0.5  # between two signals to a main thread that does not leave an update
LONG_SECONDS = 3600.0  # between two looks when there is nothing to wait for
_LEFT = b"\0"  # in the pipe, where a signal's number would be


class Abandoned(BaseException):
    """The running update is given up. No `Exception`, so that a reward's own error handling does not take it."""


class StopRequest:
    """While entered, SIGINT and SIGTERM only set `requested`, and end an abandonable update when the grace is over.

    A second signal, later than a repeat, ends the grace. Outside the main thread, where Python delivers no signals,
    nothing is ever requested.

    Args:
        grace_seconds: from the request until a running update is abandoned.

    Attributes:
        requested: whether somebody asked to stop.
    """

    def __init__(self, grace_seconds: float = math.inf) -> None:
        self.requested = False
        self._grace = grace_seconds
        self._asked_at, self._deadline = 0.0, math.inf
        self._abandonable = False
        self._previous: dict[int, signal.Handlers] = {}
        self._pipe: tuple[int, int] | None = None  # the kernel's word that a signal came, read by the watch
        self._watch: threading.Thread | None = None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)  # type: ignore[assignment]
        self._watch = threading.Thread(target=self._insist, args=(self._pipe[0],), name="stop-grace", daemon=True)
        self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._abandonable = False
        if not self._pipe or not self._watch:
            return
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._pipe[1], _LEFT)
        self._watch.join()  # before the handlers change: its last signal must find ours
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        for end in self._pipe:
            os.close(end)
        self._pipe, self._previous = None, {}

    @contextmanager
    def abandonable(self) -> Iterator[None]:
        """Work inside is given up when the grace is over; around it, nothing is ever interrupted.

        Raises:
            Abandoned: it is over.
        """
        self._abandonable = True
        try:
            self._raise_when_over()
            yield
        finally:
            self._abandonable = False

    def settle(self) -> None:
        """After `Abandoned` was caught: no second one will come."""
        self._abandonable = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._asked_at = True, now
            self._deadline = min(self._deadline, now + self._grace)
        elif now - self._asked_at > REPEAT_SECONDS:
            self._deadline = min(self._deadline, now)
        self._raise_when_over()

    def _raise_when_over(self) -> None:
        if self._abandonable and time.monotonic() >= self._deadline:
            raise Abandoned

    def _insist(self, pipe: int) -> None:
        """In a thread: when the grace is over, signal the main thread until it has left the update.

        The first signal may have come where Python could not look at it, just before a long system call, say; and an
        exception out of a signal handler is lost where Python calls code that may not fail.
        """
        asked, wait = False, LONG_SECONDS
        while True:
            ready, _, _ = select.select([pipe], [], [], wait)
            numbers = os.read(pipe, 4096) if ready else b""
            if _LEFT in numbers:
                return
            asked = asked or signal.SIGINT in numbers or signal.SIGTERM in numbers
            if not asked:
                continue
            now = time.monotonic()
            self._deadline = min(self._deadline, now + self._grace)
            left = self._deadline - now
            if not ready and left <= 0 and self._abandonable:  # what is ready may be our own signal's number
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            wait = min(left if left > 0 else INSIST_SECONDS, LONG_SECONDS)
