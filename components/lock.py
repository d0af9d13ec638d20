"""One writer an output: a lock file that the kernel releases when its holder dies."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from tuneloop.errors import UserError


@contextlib.contextmanager
def exclusive_lock(path: Path, holds: str) -> Iterator[None]:
    """Hold the lock file `path`, which exists only while it is held.

    Raises:
        UserError: another process holds it, or the file cannot be made; `holds` is what the line names.
    """
    lock = _acquire(path, holds)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _acquire(path: Path, holds: str) -> int:
    while True:
        try:
            lock = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{holds}: cannot be written ({error.strerror}); choose another output") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"{holds}: another run is writing it; wait for it or choose another output") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        os.close(lock)  # the holder before us removed the file between our open and our lock
