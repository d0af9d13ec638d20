"""From a URI to the storage that holds it, and the few things that steps do with one."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlparse

from tuneloop.errors import UserError
from tuneloop.progress import Progress
from tuneloop.storage.base import NotFound, Storage, temporary_beside
from tuneloop.storage.local import LocalStorage


def local_path(uri: str) -> Path:
    """The local path that a `file://` URI or a plain path names.

    Raises:
        UserError: the URI names another kind of storage, or is what is left of an s3:// without a bucket.
    """
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    if parsed.scheme and "://" in uri:
        raise UserError(f"{uri}: only local paths and file:// are accepted here")
    if uri.partition("/")[0] == "s3:":
        raise UserError(f"{uri}: names no bucket; write s3://bucket/prefix")
    return Path(uri)


def open_storage(uri: str) -> Storage:
    """The storage whose root is the folder that a plain path, `file://` or `s3://bucket/prefix` names.

    Raises:
        UserError: another scheme, no bucket, or a root that is a file.
    """
    if not is_remote(uri):
        return LocalStorage(local_path(uri))
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise UserError(f"{uri}: names no bucket; write s3://bucket/prefix")
    from tuneloop.storage.s3 import S3Storage

    return S3Storage(bucket, prefix)


def storage_for(uri: str) -> tuple[Storage, str]:
    """The storage that holds a file, and the file's key there.

    Raises:
        UserError: as `open_storage`, or the URI names no file.
    """
    if is_remote(uri):
        folder, _, name = uri.rpartition("/")
        if folder in ("s3:/", "s3:") or not name:
            raise UserError(f"{uri}: names no object; write s3://bucket/folder/name")
        return open_storage(folder), name
    path = local_path(uri)
    if not path.name:
        raise UserError(f"{uri!r}: names no file")
    return LocalStorage(path.parent), path.name


def is_remote(uri: str) -> bool:
    """Whether a URI names something in an object store, and not on this machine."""
    return uri.startswith("s3://")


def read_file(uri: str) -> bytes:
    """The content of a local file, `file://` or `s3://` object.

    Raises:
        UserError, TryAgain: as `read_stream`.
    """
    storage, key = storage_for(uri)
    return storage.read_bytes(key)


def write_file(uri: str, content: bytes) -> None:
    """Make a local file, `file://` or `s3://` object, which appears whole; what was there is replaced.

    Raises:
        UserError, TryAgain: the storage refuses, or cannot be reached.
        OSError: the local disk refuses.
    """
    if is_remote(uri):
        storage, key = storage_for(uri)
        storage.write_bytes(key, content)
        return
    path = local_path(uri)  # plain, without the checksum that local storage keeps beside what it holds
    partial = temporary_beside(path)
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def delete_file(uri: str) -> None:
    """Remove a local file or `s3://` object; nothing there is no error."""
    if is_remote(uri):
        storage, key = storage_for(uri)
        storage.delete(key)
    else:
        local_path(uri).unlink(missing_ok=True)


def read_stream(uri: str) -> BinaryIO:
    """The bytes of a local file, `file://` or `s3://` object, as a verified stream that cannot seek.

    Raises:
        UserError: there is no such file or object, or it may not be read.
        TryAgain: the storage cannot be reached.
    """
    storage, key = storage_for(uri)
    return storage.open_read(key)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local file with the content of `uri`, for readers that must seek: the file itself when it is local already,
    else a verified copy that is removed afterwards.

    Raises:
        UserError, TryAgain: as `read_stream`.
    """
    storage, key = storage_for(uri)
    if isinstance(storage, LocalStorage):
        if not storage.exists(key):
            raise NotFound(f"{uri}: no such file")
        yield storage.root / key
        return
    with tempfile.TemporaryDirectory(prefix="tuneloop-") as folder:
        path = Path(folder) / key
        storage.get_file(key, path)
        yield path


def download_tree(uri: str, to: Path) -> Path:
    """Fetch everything below a URI into the folder `to`, which appears whole and verified; returns `to`.

    A folder that is there already is complete, and is kept: name it after what it holds. Processes that want the same
    folder wait for the one that fetches it.

    Raises:
        UserError: nothing is stored below the URI, or it may not be read.
        TryAgain: the storage cannot be reached.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    with open(to.with_name(f".{to.name}.lock"), "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if to.is_dir() and any(to.iterdir()):
            return to
        with Progress(f"fetching {uri}", total=0) as progress:

            def count(total: int) -> None:
                progress.total = total
                progress.advance()

            open_storage(uri).get_tree("", to, on_file=count)
    return to
