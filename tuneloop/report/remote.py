"""The report of a run whose folder may lie in an object store."""

import contextlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tuneloop.errors import UserError
from tuneloop.report.build import build_report
from tuneloop.storage import NotFound, Storage, is_remote, local_path, open_storage

_READ = (".json", ".jsonl", ".md")  # what a report is made of; models, adapters and data stay where they are
_AT_ONCE = 8


@contextlib.contextmanager
def report_of(run_uri: str, error: str = "") -> Iterator[Path]:
    """Build the report of a run, and leave it in the run folder; yields a local folder that holds it.

    Args:
        run_uri: the run folder.
        error: why the run ended, when nothing in the folder tells.

    Raises:
        UserError: there is no such run.
        TryAgain: the object store is unavailable.
    """
    with fetched_run(run_uri) as folder:
        files = build_report(folder, error)
        if is_remote(run_uri):
            storage = open_storage(run_uri)
            storage.put_tree(folder / "report", "report")
            storage.put_file(files.summary, files.summary.name)
        yield folder


@contextlib.contextmanager
def fetched_run(run_uri: str) -> Iterator[Path]:
    """A local folder with what a report and a summary read of a run: the run folder itself when it is local.

    Raises:
        UserError: there is no such run.
        TryAgain: the object store is unavailable.
    """
    if not is_remote(run_uri):
        yield local_path(run_uri)
        return
    storage = open_storage(run_uri)
    keys = [key for key in storage.list() if key.endswith(_READ) and "/checkpoints/" not in key]
    if not keys:
        raise UserError(f"{run_uri}: no such run; name the prefix that holds check/, data_prep/, …")
    with tempfile.TemporaryDirectory(prefix="tuneloop-") as scratch:
        folder = Path(scratch) / run_uri.rstrip("/").rpartition("/")[2]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(lambda key: _fetch(storage, key, folder / key), keys))
        yield folder


def _fetch(storage: Storage, key: str, path: Path) -> None:
    with contextlib.suppress(NotFound):  # a step has ended meanwhile, and what it worked with is gone
        storage.get_file(key, path)
