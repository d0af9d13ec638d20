"""Bytes in, bytes out: local folders and S3 behind one contract."""

from pathlib import Path
from urllib.parse import unquote, urlparse

from tuneloop.errors import UserError


def local_path(uri: str) -> Path:
    """The local path that a `file://` URI or a plain path names.

    Raises:
        UserError: the URI names another kind of storage.
    """
    parsed = urlparse(uri)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    if parsed.scheme and "://" in uri:
        raise UserError(f"{uri}: only local paths and file:// are accepted here")
    return Path(uri)
