"""Small facts about files that sources read."""

from tuneloop.errors import UserError
from tuneloop.storage import local_path


def local_size(uri: str) -> int:
    """Bytes of a local file; 0 when the URI names another kind of storage, or a compressed file.

    Raises:
        UserError: there is no such file, or it is a folder.
    """
    if uri.startswith("s3://"):
        return 0
    path = local_path(uri)
    if path.is_dir():
        raise UserError(f"{uri}: a folder; name a file in it")
    if not path.exists():
        raise UserError(f"{uri}: no such file")
    return 0 if path.suffix == ".gz" else path.stat().st_size
