"""Data sources and rewards: there, not empty, importable; without reading rows."""

from collections.abc import Sequence

from components.config import RunConfig
from components.data_prep.config import SourceSettings
from components.data_prep.step import make_source
from tuneloop.errors import UserError
from tuneloop.rewards.base import build_scorer
from tuneloop.settings import TaskSettings
from tuneloop.storage import local_path, open_storage, storage_for


def check_sources(sources: Sequence[SourceSettings], task: TaskSettings) -> list[str]:
    """See that every source can be read.

    Returns:
        One line a source that could not be verified without fetching it.

    Raises:
        UserError: missing, unreadable, empty, or a reasoning-gym task or option that does not exist.
        TryAgain: the storage is unavailable.
    """
    unverified = []
    for number, source in enumerate(sources):
        where = f"data_prep.sources.{number}"
        if source.kind == "reasoning_gym":
            make_source(source, task)
        elif source.kind == "huggingface" and not local_path(source.uri).exists():
            unverified.append(f"{where}: {source.uri} is fetched from the hub by data_prep")
        else:
            _check_stored(where, source.uri)
    return unverified


def check_rewards(config: RunConfig) -> None:
    """Build every reward once.

    Raises:
        UserError: a regular expression that does not compile, a function that cannot be imported, a missing package.
    """
    build_scorer(config.task.rewards)


def _check_stored(where: str, uri: str) -> None:
    if uri.startswith("s3://"):
        storage, key = storage_for(uri)
        if not storage.exists(key) and not open_storage(uri).list():
            raise UserError(f"{where}.uri {uri}: nothing is stored there")
        return
    path = local_path(uri)
    try:
        if not path.exists():
            raise UserError(f"{where}.uri {uri}: no such file")
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        if not any(file.stat().st_size for file in files):
            raise UserError(f"{where}.uri {uri}: is empty; name a file with rows")
        with next(file for file in files if file.stat().st_size).open("rb") as file:
            file.read(1)
    except OSError as error:
        raise UserError(f"{where}.uri {uri}: cannot be read ({error.strerror}); change its permissions") from None
