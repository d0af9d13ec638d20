"""Folders that are made once and shared: filled by one process, seen by others only when complete."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from tuneloop.errors import UserError

_OUT_OF_ROOM = (13, 28, 30, 122)  # EACCES, ENOSPC, EROFS, EDQUOT


def default_cache_dir() -> Path:
    """`$TUNELOOP_CACHE`, or `~/.cache/tuneloop`."""
    return Path(os.environ.get("TUNELOOP_CACHE") or Path.home() / ".cache" / "tuneloop")


def cached_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """The folder `target`, made by `fill(folder)` if nobody has made it yet.

    `fill` works in a folder beside it, which is renamed when it is complete. A lock makes a second process wait and
    then find the first one's folder; the kernel drops the lock of a process that dies.

    Raises:
        UserError: the cache cannot be written.
    """
    if target.is_dir():
        return target
    with _clear_disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f".{target.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if target.is_dir():
                return target
            partial = target.with_name(f".{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                fill(partial)
                os.replace(partial, target)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    return target


@contextlib.contextmanager
def _clear_disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _OUT_OF_ROOM:
            raise UserError(
                f"{target}: cannot be written ({error.strerror}); free space or set TUNELOOP_CACHE to another folder"
            ) from error
        raise
