"""The contract of storage, and what every kind of storage shares."""

import enum
import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Final, Literal, Protocol

from tuneloop.errors import TryAgain, UserError

CHUNK_BYTES = 1 << 20
PARALLEL_FILES = 4
# What local storage keeps beside the objects themselves: locks, checksums, files that are being written.
_RESERVED = re.compile(r"\.lock|\..+\.sha256|\.tmp-.+")


class _Absent(enum.Enum):
    ABSENT = "absent"


ABSENT: Final = _Absent.ABSENT
"""As `if_version`: write only if the key does not exist yet."""

IfVersion = str | None | Literal[_Absent.ABSENT]


class NotFound(UserError):
    """The key names nothing."""


class Damaged(UserError):
    """What is stored differs from the checksum that was stored with it."""


class VersionConflict(TryAgain):
    """A conditional write found another version than it expected; nothing was written."""


class Storage(Protocol):
    """Bytes in, bytes out, under keys such as `adapters/7/adapter_config.json`, below one root URI.

    Contract:
        - A put is atomic: at every instant a reader finds the old content whole, the new content whole, or, before the
          first put, nothing. When a put returns, the content survives the process and the machine.
        - A put stores the content's sha256 with it, and every get compares: what is returned is what was put, or
          `Damaged` is raised. Objects that something else stored carry no such checksum and are returned as they are.
        - `write_bytes` with `if_version` is a compare-and-swap: of any number of writers that expect the same version,
          on any number of machines, exactly one succeeds and the others raise `VersionConflict`.
        - A version tag names content: putting equal bytes again may give the same tag.
        - A listing shows every put that returned before it began.
        - The user's mistakes (no such key, bucket, permission or credentials) are `UserError`; storage that cannot be
          reached or is overloaded is `TryAgain`; a full disk is `OSError`.
    """

    uri: str

    def read_versioned(self, key: str) -> tuple[bytes, str]:
        """The content, and its version tag for a later conditional write.

        Raises:
            NotFound: nothing is stored under the key.
            Damaged: the content differs from its checksum.
        """
        ...

    def read_bytes(self, key: str) -> bytes:
        """`read_versioned` without the tag."""
        return self.read_versioned(key)[0]

    def open_read(self, key: str) -> BinaryIO:
        """A stream from the first byte to the last; the read that reaches the end raises `Damaged` on a mismatch."""
        ...

    def write_bytes(self, key: str, data: bytes, *, if_version: IfVersion = None) -> str:
        """Store `data` and return its version tag.

        Args:
            if_version: a tag: only while the key has that version; `ABSENT`: only if nothing is there; None: always.

        Raises:
            VersionConflict: the condition does not hold.
        """
        ...

    def put_file(self, local: Path, key: str) -> str:
        """Store a local file; returns its sha256 (hex)."""
        ...

    def get_file(self, key: str, local: Path) -> str:
        """Fetch into a local file, which appears whole and verified; returns its sha256 (hex)."""
        ...

    def exists(self, key: str) -> bool:
        """Whether something is stored under the key itself (not below it)."""
        ...

    def delete(self, key: str) -> None:
        """Remove what is stored under the key; nothing there is no error."""
        ...

    def put_tree(self, local: Path, key: str, leave_out: Sequence[str] = ()) -> dict[str, str]:
        """Store every file below a local folder under `key/<relative path>`, each atomically.

        Args:
            leave_out: relative paths that are not stored.

        Returns:
            relative path -> sha256 (hex).
        """
        names = [name for name in files_below(local) if name not in leave_out]
        with ThreadPoolExecutor(PARALLEL_FILES) as pool:
            digests = pool.map(lambda name: self.put_file(local / name, join_key(key, name)), names)
            return dict(zip(names, digests, strict=True))

    def get_tree(self, key: str, local: Path, on_file: Callable[[int], None] | None = None) -> dict[str, str]:
        """Fetch everything under `key/` into a local folder, which appears whole and verified.

        Args:
            local: the folder to make; it must not exist, or be empty.
            on_file: called with the number of files in all, once a file has come.

        Returns:
            relative path -> sha256 (hex).

        Raises:
            NotFound: nothing is stored under `key/`.
            UserError: `local` holds something.
        """
        keys = self.list(key)
        if not keys:
            raise NotFound(f"{join_uri(self.uri, key)}: holds no files")
        names = [found[len(key) + 1 :] if key else found for found in keys]
        if local.exists() and (not local.is_dir() or any(local.iterdir())):
            raise UserError(
                f"{local}: is in the way of what is to be fetched from {join_uri(self.uri, key)}; remove it"
            )
        partial = temporary_beside(local)

        digests = {}
        try:
            with ThreadPoolExecutor(PARALLEL_FILES) as pool:
                fetched = pool.map(lambda name: self.get_file(join_key(key, name), partial / name), names)
                for name, digest in zip(names, fetched, strict=True):
                    digests[name] = digest
                    if on_file:
                        on_file(len(names))
            os.replace(partial, local)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return digests

    def versions(self, prefix: str = "") -> dict[str, str]:
        """Key -> version tag of everything under `prefix/`: equal tags, equal content."""
        return {key: self.read_versioned(key)[1] for key in self.list(prefix)}

    def list(self, prefix: str = "") -> list[str]:
        """The keys under `prefix/` (everything when empty), sorted; empty when there are none."""
        ...


class VerifyingReader(io.RawIOBase):
    """Reads a binary stream to its end once, and compares what it read with the expected sha256.

    Args:
        raw: the stream; closed together with this one.
        expected: the sha256 (hex) values that are right; empty when none is known.
        name: what is read, for the error message.
    """

    def __init__(self, raw: BinaryIO | io.RawIOBase, expected: frozenset[str], name: str):
        super().__init__()
        self._raw, self._expected, self._name = raw, expected, name
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride] buffers only
        data = self._raw.read(len(buffer)) or b""
        if not data and len(buffer):
            check_digest(self._digest.hexdigest(), self._expected, self._name)
        self._digest.update(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._raw.close()
        super().close()


def check_digest(actual: str, expected: frozenset[str], name: str) -> None:
    """Raise `Damaged` unless a known sha256 matches."""
    if expected and actual not in expected:
        raise Damaged(f"{name}: differs from the checksum that was stored with it; restore it from a copy")


def check_key(key: str) -> str:
    """The key itself.

    Raises:
        UserError: not a plain relative path, or a name that storage keeps for itself.
    """
    parts = key.split("/")
    if not key or any(part in ("", ".", "..") for part in parts) or "\0" in key or "\\" in key:
        raise UserError(f"{key!r}: not a key; write a relative path such as folder/name")
    if any(_RESERVED.fullmatch(part) for part in parts):
        raise UserError(f"{key!r}: the names .lock, .*.sha256 and .tmp-* are reserved; choose another")
    return key


def files_below(folder: Path) -> list[str]:
    """The relative paths of a local folder's files that `put_tree` stores, sorted.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, so there is nothing to store")
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in files if not any(map(_RESERVED.fullmatch, path.parts)))


def is_reserved(name: str) -> bool:
    """Whether local storage keeps a file of this name for itself."""
    return bool(_RESERVED.fullmatch(name))


def join_key(*parts: str) -> str:
    """Parts of a key joined by slashes, empty ones left out."""
    return "/".join(part for part in parts if part)


def join_uri(uri: str, key: str) -> str:
    """The URI of a key, for messages."""
    return f"{uri.rstrip('/')}/{key}" if key else uri


def temporary_beside(path: Path) -> Path:
    """An unused name in the same folder, which every listing leaves out."""
    return path.with_name(f".tmp-{uuid.uuid4().hex[:12]}-{path.name}"[:255])


def copy_to_file(source: BinaryIO, path: Path) -> str:
    """Write a whole stream to a new file and bring it to the disk; returns its sha256 (hex)."""
    digest = hashlib.sha256()
    with open(path, "xb") as target:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()
