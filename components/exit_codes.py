"""Outcomes as exit codes: 0 done, 2 the user's mistake, 3 the gate said no, 75 try again, 1 a bug."""

import contextlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from tuneloop.errors import EXIT_OK, TryAgain, TuneloopError
from tuneloop.training.stopping import REPEAT_SECONDS


class Stopped(TryAgain):
    """SIGINT or SIGTERM asked to stop."""


def exit_code_of(action: Callable[[], object], on_failure: Callable[[int, str], None] = lambda *_: None) -> int:
    """Run `action` and turn its outcome into the shared exit codes; our own errors print one line.

    Args:
        action: what to run; SIGINT and SIGTERM raise `Stopped` in it.
        on_failure: called with the exit code and one line that says why.
    """
    try:
        with stop_on_signals():
            action()
    except TuneloopError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        on_failure(error.exit_code, str(error))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        on_failure(1, " ".join(f"{type(error).__name__}: {error}".split()))
        return 1
    return EXIT_OK


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `Stopped` inside; a repeat within `REPEAT_SECONDS` is the same request."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    asked_at = float("-inf")

    def stop(signum: int, frame: Any) -> None:
        nonlocal asked_at
        if time.monotonic() - asked_at < REPEAT_SECONDS:
            return
        asked_at = time.monotonic()
        raise Stopped(f"stopped by {signal.Signals(signum).name}; the same command continues where it can")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
