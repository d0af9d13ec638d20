"""Bytes in, bytes out: local folders and S3 behind one contract."""

from tuneloop.storage.base import (
    ABSENT,
    Damaged,
    IfVersion,
    NotFound,
    Storage,
    VersionConflict,
    files_below,
    is_reserved,
    join_uri,
)
from tuneloop.storage.local import LocalStorage
from tuneloop.storage.uris import (
    delete_file,
    download_tree,
    is_remote,
    local_copy,
    local_path,
    open_storage,
    read_file,
    read_stream,
    storage_for,
    write_file,
)

__all__ = [
    "ABSENT",
    "Damaged",
    "IfVersion",
    "LocalStorage",
    "NotFound",
    "Storage",
    "VersionConflict",
    "delete_file",
    "download_tree",
    "files_below",
    "is_remote",
    "is_reserved",
    "join_uri",
    "local_copy",
    "local_path",
    "open_storage",
    "read_file",
    "read_stream",
    "storage_for",
    "write_file",
]
