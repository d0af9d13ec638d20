"""Where a step's inputs lie and its output goes: folders on this machine, or under an object store's prefix.

In an object store an output is complete once its `step.json` is there, which is stored last and only if nobody stored
another one meanwhile. What a killed run left lies under `<output>.partial/`. The local disk holds copies only, below
the cache folder, and may be empty at every start.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from components.lock import exclusive_lock
from components.mirror import FINGERPRINT, Mirror, discard, restore, saved_update
from components.result import RESULT, StepResult
from tuneloop.errors import UserError
from tuneloop.models.cache import default_cache_dir
from tuneloop.storage import (
    ABSENT,
    NotFound,
    Storage,
    VersionConflict,
    download_tree,
    is_remote,
    local_path,
    open_storage,
)


class Place(Protocol):
    """Where the output of a step goes.

    Attributes:
        name: the output, as messages name it.
        folder: the local folder that appears when the step is complete.
        partial: the local folder that the step fills.
    """

    name: str
    folder: Path
    partial: Path

    def claimed(self) -> contextlib.AbstractContextManager[None]:
        """Be the only process on this machine that makes the output.

        Raises:
            UserError: another one is at it, or the disk refuses.
        """
        ...

    def finished(self) -> StepResult | None:
        """What the finished step left here; None if there is no finished step."""
        ...

    def made(self, fingerprint: str) -> bool:
        """Whether `folder` is complete already, made from this, and only has to be published."""
        ...

    def begin(self, fingerprint: str) -> None:
        """Bring back into `partial` what a run of the same fingerprint has saved elsewhere."""
        ...

    def mirrored(self) -> contextlib.AbstractContextManager[None]:
        """While the step runs, keep what it saves in `partial` safe from the loss of this machine."""
        ...

    def publish(self) -> StepResult:
        """Make the complete `folder` the output; what is there then, should another one have been first."""
        ...


def open_place(uri: str) -> Place:
    """The place of an output.

    Raises:
        UserError: no local path, file:// or s3:// URI.
    """
    return RemotePlace(uri) if is_remote(uri) else LocalPlace(uri)


class LocalPlace(Place):
    """A folder on this machine."""

    def __init__(self, uri: str):
        self.folder = local_path(uri)
        if not self.folder.name:
            raise UserError(f"{uri!r}: names no folder for the output; name one that is not there yet")
        self.partial = _partial(self.folder)
        self.name = str(self.folder)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        with _exclusive(self.folder), _writable(self.folder):
            yield

    def finished(self) -> StepResult | None:
        return StepResult.read(self.folder) if self.folder.exists() else None

    def made(self, fingerprint: str) -> bool:
        return False

    def begin(self, fingerprint: str) -> None:
        return

    def mirrored(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def publish(self) -> StepResult:
        return StepResult.read(self.folder)


class RemotePlace(Place):
    """A prefix of an object store; the step works in a folder of the cache."""

    def __init__(self, uri: str):
        self.name = uri.rstrip("/")
        work = hashlib.sha256(self.name.encode()).hexdigest()[:16]
        self.folder = default_cache_dir() / "outputs" / work / self.name.rpartition("/")[2]
        self.partial = _partial(self.folder)
        self._storage = open_storage(self.name)
        self._saved = open_storage(f"{self.name}.partial")

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        with _exclusive(self.folder), _writable(self.folder):
            yield

    def finished(self) -> StepResult | None:
        try:
            return StepResult.parse(self._storage.read_bytes(RESULT), self.name)
        except NotFound:
            return None

    def made(self, fingerprint: str) -> bool:
        with contextlib.suppress(UserError):
            if StepResult.read(self.folder).fingerprint == fingerprint:
                return True
        shutil.rmtree(self.folder, ignore_errors=True)  # of other settings, and it never arrived
        return False

    def begin(self, fingerprint: str) -> None:
        if saved_update(self._saved) is None:
            return
        if _read(self._saved, FINGERPRINT) != fingerprint:
            print(f"{self.name}.partial: was made from other settings or inputs; starting over", flush=True)
            discard(self._saved)
            return
        restore(self._saved, self.partial)

    def mirrored(self) -> contextlib.AbstractContextManager[None]:
        return Mirror(self.partial, self._saved)

    def publish(self) -> StepResult:
        result = self.finished()  # somebody else's, such as a pod's that replaced this one: its files stay as they are
        if result is None:
            result = self._store()
        discard(self._saved)
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        return result

    def _store(self) -> StepResult:
        result = StepResult.read(self.folder)
        stored = self._storage.put_tree(self.folder, "", leave_out=(RESULT,))
        for key in self._storage.list():
            if key not in stored and key != RESULT:
                self._storage.delete(key)  # of an attempt that was killed while it stored
        try:
            self._storage.write_bytes(RESULT, (self.folder / RESULT).read_bytes(), if_version=ABSENT)
        except VersionConflict:
            result = StepResult.parse(self._storage.read_bytes(RESULT), self.name)
        return result


class Input:
    """What a step reads: the output of another step, or a folder like one.

    Args:
        option: the option that names it, for messages.
        reader: the step.

    Raises:
        UserError: nothing is there.
    """

    def __init__(self, option: str, uri: str, reader: str):
        self.uri = uri
        missing = UserError(f"{option} {uri}: does not exist, so {reader} has nothing to read")
        if is_remote(uri):
            self._versions = open_storage(uri).versions()
            if not self._versions:
                raise missing
        elif not local_path(uri).exists():
            raise missing

    @property
    def name(self) -> str:
        """As a record names it."""
        return self.uri if is_remote(self.uri) else str(local_path(self.uri))

    def fingerprint(self) -> str | None:
        """Of the step that made it; None if no step did."""
        with contextlib.suppress(UserError):
            if not is_remote(self.uri):
                return StepResult.read(local_path(self.uri)).fingerprint
            return StepResult.parse(open_storage(self.uri).read_bytes(RESULT), self.uri).fingerprint
        return None

    def fetch(self) -> Path:
        """A local folder that holds it."""
        if not is_remote(self.uri):
            return local_path(self.uri)
        content = json.dumps([self.uri, self._versions], sort_keys=True).encode()
        cached = default_cache_dir() / "inputs" / hashlib.sha256(content).hexdigest()[:16]
        return download_tree(self.uri, cached)


def _partial(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial")


def _read(storage: Storage, key: str) -> str | None:
    try:
        return storage.read_bytes(key).decode()
    except NotFound:
        return None


@contextlib.contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Hold the output's lock; the kernel drops it when the process dies."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror}); choose another output") from None
    with exclusive_lock(target.with_name(f".{target.name}.lock"), holds=str(target)):
        yield


@contextlib.contextmanager
def _writable(target: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{target}: {os.strerror(error.errno)}; free space or choose another output") from error
        raise
