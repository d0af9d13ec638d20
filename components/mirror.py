"""Checkpoints in an object store: sent while the step trains, fetched when another machine continues it.

```text
<output>.partial/fingerprint                        what the step is being made from
<output>.partial/<logs>                             at least as far as the checkpoint knows them
<output>.partial/checkpoints/update-000130/…        one checkpoint, its COMMITTED stored after everything else
```
"""

import contextlib
import os
import re
import shutil
import sys
import threading
from pathlib import Path

from tuneloop.checkpoint import MARKER
from tuneloop.errors import TryAgain
from tuneloop.storage import Damaged, NotFound, Storage, is_reserved

FINGERPRINT = "fingerprint"  # in a partial output: what it is being made from
CHECKPOINTS = "checkpoints"  # in a resumable step's partial output: without it there is nothing worth keeping
POLL_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
_COMMITTED = re.compile(rf"{CHECKPOINTS}/(update-(\d+))/{MARKER}")


class Mirror(contextlib.AbstractContextManager[None]):
    """While entered, sends each new checkpoint in `partial`, and the logs beside it, without holding up the step.

    Storage that is unavailable is asked again until it answers. When the step ends by an exception, its last checkpoint
    is sent before this is left; a step that is complete is published whole, and needs no checkpoint any more.
    """

    def __init__(self, partial: Path, storage: Storage):
        self._partial, self._storage = partial, storage
        self._staging = partial.with_name(f"{partial.name}.sending")
        self._sent: dict[str, tuple[int, int]] = {}  # log -> its size and time when it was sent
        self._marker = b""  # of the checkpoint that was sent last
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if kind is not None:
            self._send_or_say()
        shutil.rmtree(self._staging, ignore_errors=True)

    def _run(self) -> None:
        wait = POLL_SECONDS
        while not self._ended.wait(wait):
            wait = POLL_SECONDS if self._send_or_say() else min(LONGEST_WAIT_SECONDS, 2 * wait)

    def _send_or_say(self) -> bool:
        try:
            self.send()
        except Exception as error:  # whatever it is, later checkpoints must still be sent, and the step go on
            print(f"warning: the newest checkpoint is on this machine only: {error}", file=sys.stderr, flush=True)
            return False
        return True

    def send(self) -> None:
        """Send the newest checkpoint, unless it was the last one sent.

        Raises:
            TryAgain, UserError: storage is unavailable, or refuses.
        """
        newest = newest_checkpoint(self._partial)
        if newest is None:
            return
        try:
            marker = (newest / MARKER).read_bytes()
            if marker == self._marker:
                return
            checkpoint, logs = self._stage(newest)
        except FileNotFoundError:
            return  # replaced by a newer one meanwhile
        key = f"{CHECKPOINTS}/{newest.name}"
        if self._stored_marker(key) == marker:  # it was fetched from there, or its answer was lost
            self._marker = marker
            return
        self._storage.delete(f"{key}/{MARKER}")  # while its files are replaced, it is none
        self._storage.put_tree(checkpoint, key, leave_out=(MARKER,))
        for name, state in logs.items():
            self._storage.put_file(self._staging / name, name)
            self._sent[name] = state
        self._storage.write_bytes(f"{key}/{MARKER}", marker)
        self._marker = marker
        self._remove_older(newest.name)

    def _stored_marker(self, key: str) -> bytes | None:
        try:
            return self._storage.read_bytes(f"{key}/{MARKER}")
        except (NotFound, Damaged):
            return None

    def _stage(self, checkpoint: Path) -> tuple[Path, dict[str, tuple[int, int]]]:
        """Take hold of a checkpoint, by links, and of the logs that have changed, by copies."""
        shutil.rmtree(self._staging, ignore_errors=True)
        staged = self._staging / CHECKPOINTS / checkpoint.name
        for path in _files(checkpoint):
            target = staged / path.relative_to(checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(path, target)
        logs = {}
        for path in _files(self._partial):
            name = path.relative_to(self._partial).as_posix()
            if name.startswith(f"{CHECKPOINTS}/"):
                continue
            state = path.stat()
            logs[name] = (state.st_size, state.st_mtime_ns)
            if self._sent.get(name) == logs[name]:
                del logs[name]
                continue
            (self._staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, self._staging / name)
        return staged, logs

    def _remove_older(self, kept: str) -> None:
        """Remove what is older; a newer one is another pod's that is still alive, and as good."""
        keys = [key for key in self._storage.list(CHECKPOINTS) if _number(key.split("/")[1]) < _number(kept)]
        for key in sorted(keys, key=lambda key: not key.endswith(f"/{MARKER}")):  # a marker before what it vouches for
            self._storage.delete(key)


def newest_checkpoint(partial: Path) -> Path | None:
    """The folder of the newest committed checkpoint in a partial output."""
    markers = (path.relative_to(partial).as_posix() for path in partial.glob(f"{CHECKPOINTS}/*/{MARKER}"))
    found = [match for match in map(_COMMITTED.fullmatch, markers) if match]
    newest = max(found, key=lambda match: int(match[2]), default=None)
    return partial / CHECKPOINTS / newest[1] if newest else None


def saved_update(storage: Storage) -> str | None:
    """The name of the newest committed checkpoint in a store."""
    found = [match for match in map(_COMMITTED.fullmatch, storage.list(CHECKPOINTS)) if match]
    newest = max(found, key=lambda match: int(match[2]), default=None)
    return newest[1] if newest else None


def restore(storage: Storage, partial: Path) -> None:
    """Make `partial` what the store holds: its newest checkpoint and the logs; a newer one on this machine is kept.

    Raises:
        TryAgain: the store is unavailable, or the checkpoint was replaced while it was fetched.
        Damaged: it differs from its checksum.
    """
    name = saved_update(storage)
    here = newest_checkpoint(partial)
    if name is None or (here is not None and _number(here.name) >= _number(name)):
        return
    print(f"fetched {name} of {storage.uri}", flush=True)
    fetched = partial.with_name(f"{partial.name}.fetched")
    shutil.rmtree(fetched, ignore_errors=True)
    try:
        for key in storage.list():
            if not key.startswith(f"{CHECKPOINTS}/") or key.startswith(f"{CHECKPOINTS}/{name}/"):
                storage.get_file(key, fetched / key)
        shutil.rmtree(partial, ignore_errors=True)
        os.replace(fetched, partial)
    except NotFound as error:
        raise TryAgain(f"{error}: another pod has replaced the checkpoint while it was fetched") from None
    finally:
        shutil.rmtree(fetched, ignore_errors=True)


def discard(storage: Storage) -> None:
    """Remove everything from a store, what vouches for the rest first."""
    for key in sorted(storage.list(), key=lambda key: not key.endswith(f"/{MARKER}")):
        storage.delete(key)


def _number(name: str) -> int:
    return int(name.removeprefix("update-"))


def _files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if not any(map(is_reserved, path.relative_to(folder).parts))]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
