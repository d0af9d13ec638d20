"""Where the run writes: the registry and the disk under its output."""

import os
import shutil
from pathlib import Path

from components.config import RunConfig
from tuneloop.errors import UserError
from tuneloop.storage import local_path, open_storage


def check_places(config: RunConfig, output: Path, needed_bytes: int) -> int:
    """See that the registry can be used and that the disk has room.

    Args:
        output: a folder on the disk that the run writes to.
        needed_bytes: what the run's files are expected to take.

    Returns:
        The free bytes of that disk.

    Raises:
        UserError: the registry cannot be used, or the disk has less room than the plan or the config demands.
        TryAgain: the registry's storage is unavailable.
    """
    _check_registry(config.promote.registry)
    free = shutil.disk_usage(output).free
    wanted = needed_bytes + config.check.min_free_disk_bytes
    if free < wanted:
        raise UserError(
            f"{output.parent}: {free / 1e9:.1f} GB free, and the run needs {needed_bytes / 1e9:.1f} GB with "
            f"check.min_free_disk_bytes = {config.check.min_free_disk_bytes:,} to spare: free space or choose another "
            "output"
        )
    return free


def _check_registry(uri: str) -> None:
    if uri.startswith("s3://"):
        open_storage(uri).exists("probe")
        return
    path = local_path(uri).absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        raise UserError(f"promote.registry {uri}: {existing} is a file; name a folder or s3://bucket/prefix")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"promote.registry {uri}: {existing} cannot be written; change its permissions or the registry")
