"""Bytes in, bytes out: local folders and S3 behind one contract."""

from tuneloop.storage.base import ABSENT, Damaged, IfVersion, NotFound, Storage, VersionConflict, files_below
from tuneloop.storage.local import LocalStorage
from tuneloop.storage.uris import download_tree, local_copy, local_path, open_storage, read_stream, storage_for

__all__ = [
    "ABSENT",
    "Damaged",
    "IfVersion",
    "LocalStorage",
    "NotFound",
    "Storage",
    "VersionConflict",
    "download_tree",
    "files_below",
    "local_copy",
    "local_path",
    "open_storage",
    "read_stream",
    "storage_for",
]
