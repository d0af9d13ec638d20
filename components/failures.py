"""`<step>.failed.json` in a run folder: which step failed, with what exit code, and one line that says why."""

import contextlib
import json
from dataclasses import dataclass

from tuneloop.errors import TuneloopError
from tuneloop.storage import NotFound, delete_file, join_uri, open_storage, write_file


@dataclass(frozen=True)
class StepFailure:
    """The content of one."""

    step: str
    exit_code: int
    message: str


def record_failure(run_uri: str, failure: StepFailure) -> None:
    """Leave it in the run folder; where that cannot be written, the line on stderr has to do."""
    with contextlib.suppress(OSError, TuneloopError):
        write_file(_uri(run_uri, failure.step), (json.dumps(failure.__dict__) + "\n").encode())


def forget_failure(run_uri: str, step: str) -> None:
    """Remove what an earlier attempt left."""
    delete_file(_uri(run_uri, step))


def failures(run_uri: str, steps: tuple[str, ...]) -> list[StepFailure]:
    """Those of `steps` that failed, in their order."""
    found, storage = [], open_storage(run_uri)
    for step in steps:
        with contextlib.suppress(NotFound):
            found.append(StepFailure(**json.loads(storage.read_bytes(_file(step)))))
    return found


def _uri(run_uri: str, step: str) -> str:
    return join_uri(run_uri, _file(step))


def _file(step: str) -> str:
    return f"{step}.failed.json"
