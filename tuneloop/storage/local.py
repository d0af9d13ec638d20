"""Storage in a folder of a local (or network) file system.

Beside `name` lies `.name.sha256`, in the format of `sha256sum`: a sidecar needs no support from the file system,
unlike extended attributes, and survives a copy of the folder. Two files cannot be replaced at one instant, so while
`name` is replaced its sidecar names both contents: first {old, new}, then the content, then {new}. A kill between any
two of these leaves content that its sidecar vouches for.
"""

import contextlib
import fcntl
import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from tuneloop.errors import UserError
from tuneloop.files import fsync, sha256_of
from tuneloop.storage.base import (
    ABSENT,
    CHUNK_BYTES,
    IfVersion,
    NotFound,
    Storage,
    VerifyingReader,
    VersionConflict,
    check_digest,
    check_key,
    copy_to_file,
    is_reserved,
    temporary_beside,
)


class LocalStorage(Storage):
    """Storage below a folder; the version tag is the content's sha256.

    Args:
        root: the folder; made by the first put.

    Raises:
        UserError: the root is a file.
    """

    def __init__(self, root: Path):
        self.root, self.uri = root, str(root)
        if root.exists() and not root.is_dir():
            raise UserError(f"{root}: is a file, where a folder is needed; name a folder")

    def read_versioned(self, key: str) -> tuple[bytes, str]:
        with self._clear_errors(key):
            file, expected = self._open(key)
            with file:
                data = file.read()
        digest = hashlib.sha256(data).hexdigest()
        check_digest(digest, expected, str(self._path(key)))
        return data, digest

    def open_read(self, key: str) -> BinaryIO:
        with self._clear_errors(key):
            file, expected = self._open(key)
        reader = VerifyingReader(file, expected, str(self._path(key)))
        return cast(BinaryIO, io.BufferedReader(reader, CHUNK_BYTES))

    def write_bytes(self, key: str, data: bytes, *, if_version: IfVersion = None) -> str:
        return self._put(key, io.BytesIO(data), if_version)

    def put_file(self, local: Path, key: str) -> str:
        with open(local, "rb") as source:
            return self._put(key, source, None)

    def get_file(self, key: str, local: Path) -> str:
        with self.open_read(key) as source:
            local.parent.mkdir(parents=True, exist_ok=True)
            return replace_file(source, local)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._clear_errors(key), contextlib.suppress(FileNotFoundError), _locked(path.parent):
            path.unlink(missing_ok=True)
            _sidecar(path).unlink(missing_ok=True)
            fsync(path.parent)

    def list(self, prefix: str = "") -> list[str]:
        top = self._path(prefix) if prefix else self.root
        found = []
        for folder, _, names in os.walk(top):
            relative = Path(folder).relative_to(self.root)
            found += [(relative / name).as_posix() for name in names if not is_reserved(name)]
        return sorted(key for key in found if not any(map(is_reserved, key.split("/"))))

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    def _open(self, key: str) -> tuple[BinaryIO, frozenset[str]]:
        """The open content, and the digests that vouch for exactly what was opened."""
        path = self._path(key)
        while True:
            file = open(path, "rb")  # noqa: SIM115 the caller closes it
            expected = _vouched(path)
            if _is_same(file, path):
                return file, expected
            file.close()  # replaced meanwhile: the sidecar may no longer name what was opened

    def _put(self, key: str, source: BinaryIO, if_version: IfVersion) -> str:
        path = self._path(key)
        with self._clear_errors(key):
            _make_folder(path.parent)
            temporary = temporary_beside(path)
            try:
                digest = copy_to_file(source, temporary)
                with _locked(path.parent):
                    self._check_version(path, if_version)
                    _replace(path, temporary, digest)
            finally:
                temporary.unlink(missing_ok=True)
        return digest

    def _check_version(self, path: Path, if_version: IfVersion) -> None:
        if if_version is None:
            return
        current = sha256_of(path) if path.exists() else ABSENT
        if current != if_version:
            raise VersionConflict(f"{path}: was changed by someone else meanwhile")

    @contextlib.contextmanager
    def _clear_errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise NotFound(f"{self.root / key}: no such file") from None
        except (NotADirectoryError, IsADirectoryError, FileExistsError) as error:
            raise UserError(f"{self.root / key}: {error.filename} is in the way ({error.strerror})") from None
        except PermissionError as error:
            raise UserError(f"{error.filename}: permission denied; choose a folder that this user may use") from None


def replace_file(source: BinaryIO, path: Path) -> str:
    """Write a whole stream to `path`, which appears whole or stays as it was; returns the sha256 (hex)."""
    temporary = temporary_beside(path)
    try:
        digest = copy_to_file(source, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _replace(path: Path, temporary: Path, digest: str) -> None:
    """Move `temporary` to `path` and let the sidecar vouch for it; the folder's lock is held."""
    before = _vouched(path) or (frozenset({sha256_of(path)}) if path.exists() else frozenset())
    if not path.exists():
        before = frozenset()  # a sidecar that a killed delete left behind
    _write_sidecar(path, {*before, digest})
    if before:
        fsync(path.parent)  # the sidecar is on the disk before the content changes
    os.replace(temporary, path)
    fsync(path.parent)
    if before - {digest}:
        _write_sidecar(path, {digest})


def _sidecar(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def _vouched(path: Path) -> frozenset[str]:
    try:
        lines = _sidecar(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return frozenset()
    return frozenset(line.partition(" ")[0] for line in lines) or frozenset({"an empty sidecar vouches for nothing"})


def _write_sidecar(path: Path, digests: set[str]) -> None:
    text = "".join(f"{digest}  {path.name}\n" for digest in sorted(digests))
    replace_file(io.BytesIO(text.encode()), _sidecar(path))


def _is_same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return True  # deleted after it was opened: what was opened is still whole


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock; the kernel drops it when the process dies."""
    with open(folder / ".lock", "wb") as lock:  # open for writing: NFS grants an exclusive lock on nothing less
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)
