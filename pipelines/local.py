"""The whole DAG on this machine: kfp.local runs the pipeline object itself, every step in a process of its own."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from components.config import RunConfig
from components.failures import StepFailure, failures, forget_failure, record_failure
from pipelines.step_log import StepLog
from pipelines.steps import NODES
from tuneloop.config import resolved_json
from tuneloop.errors import EXIT_GATE_REFUSED, EXIT_TRY_AGAIN, EXIT_USER_ERROR, TryAgain, TuneloopError
from tuneloop.memory import TRAINING_ENVIRONMENT
from tuneloop.storage import is_remote

REPOSITORY = Path(__file__).resolve().parent.parent
_SHELLS = ("sh", "bash", "dash")  # kfp wraps every step in one


class StepFailed(TuneloopError):
    """A step of the run ended with an exit code other than 0."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def run_locally(config: RunConfig, run_uri: str, pipeline: Callable[..., Any] | None = None) -> None:
    """Run a pipeline into a run folder, here or in an object store; finished steps found there are not repeated.

    Args:
        pipeline: takes `config` and `output_uri`; None: the whole DAG.

    Raises:
        StepFailed: with the failing step's exit code.
        TryAgain: stopped by SIGINT or SIGTERM, after the running step has saved its state.
    """
    log = StepLog(sys.stdout)
    for name in NODES:
        forget_failure(run_uri, name)
    with tempfile.TemporaryDirectory(prefix="tuneloop-", ignore_cleanup_errors=True) as scratch, _Stop() as stop:
        try:
            with _environment(scratch), contextlib.redirect_stdout(log), _quiet(log):
                _run_pipeline(config, run_uri, scratch, pipeline)
        except KeyboardInterrupt:
            raise TryAgain("stopped before the next step began") from None
        except RuntimeError as error:
            if stop.asked:
                raise TryAgain("stopped; what the running step had saved is kept") from None
            raise _failure(run_uri, log, error) from None


def run_command(command: Sequence[str], title: str, run_folders: Sequence[Path]) -> None:
    """Run `python <command>`, one step of several runs, as the pipeline runs a step of one.

    Args:
        command: leaves `<step>.failed.json` in the run folders when it fails.
        title: what it is called in the log.

    Raises:
        StepFailed, TryAgain: see `run_locally`.
    """
    print(f"── {title} {'─' * (76 - len(title))}", flush=True)
    temporary = tempfile.TemporaryDirectory(prefix="tuneloop-", ignore_cleanup_errors=True)
    with temporary as scratch, _Stop() as stop, _environment(scratch):
        try:
            code = subprocess.Popen([sys.executable, *command], stderr=subprocess.STDOUT).wait()
        except KeyboardInterrupt:
            raise TryAgain("stopped before the next step began") from None
    if code == 0:
        return
    if stop.asked:
        raise TryAgain("stopped; what the running step had saved is kept")
    for folder in run_folders:
        if found := failures(str(folder), NODES):
            raise _step_failed(found[0])
    message = f"{title}: was killed, most likely for lack of memory; what it had saved is kept"
    raise StepFailed(message if code < 0 else f"{title}: failed; its traceback is in the log above", 1)


def _run_pipeline(config: RunConfig, run_uri: str, scratch: str, pipeline: Callable[..., Any] | None) -> None:
    from kfp import local

    from pipelines.post_training import post_training

    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=f"{scratch}/root",
        workspace_root=f"{scratch}/workspace",
        raise_on_error=True,
    )
    (pipeline or post_training)(
        config=resolved_json(config), output_uri=run_uri if is_remote(run_uri) else str(Path(run_uri).resolve())
    )


@contextlib.contextmanager
def _environment(scratch: str) -> Iterator[None]:
    """Steps find our packages, print without delay, and put temporary files where we remove them."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    wanted = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "TMPDIR": scratch, **TRAINING_ENVIRONMENT}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _quiet(log: StepLog) -> Iterator[None]:
    """Keep kfp's own warnings in the log, which hides them: they speak of images, and nothing runs in one here."""
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().removeHandler(handler)


def _step_failed(failure: StepFailure) -> StepFailed:
    known = failure.exit_code in (EXIT_USER_ERROR, EXIT_GATE_REFUSED, EXIT_TRY_AGAIN)
    where = "" if known else " (its traceback is in the log above)"
    return StepFailed(f"{failure.step}: {failure.message}{where}", failure.exit_code)


def _failure(run_uri: str, log: StepLog, error: RuntimeError) -> StepFailed:
    if found := failures(run_uri, NODES):
        return _step_failed(found[0])
    if killed := log.killed or log.step:
        message = "was killed, most likely for lack of memory; what it had saved is kept"
        record_failure(run_uri, StepFailure(killed, 1, message))
        return StepFailed(f"{killed}: {message}", 1)
    sys.stdout.write(log.hidden() + "\n")
    return StepFailed(f"a step could not start ({error}); what it printed is above", 1)


class _Stop:
    """Passes SIGINT and SIGTERM on to the running step and lets it save; the second one kills it."""

    def __init__(self) -> None:
        self.asked = 0
        self._terminal: TextIO = sys.stdout  # not the log, which hides what is not a step's

    def __enter__(self) -> "_Stop":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        running = _running_steps(os.getpid())
        if not running:
            raise KeyboardInterrupt
        if self.asked == 1:
            self._terminal.write("stopping: the running step saves its state; once more kills it\n")
            self._terminal.flush()
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM if self.asked == 1 else signal.SIGKILL)


def _running_steps(parent: int) -> list[int]:
    """The step processes below `parent`: its children, and in place of a shell that has children, those."""
    found = []
    for child in _children(parent):
        command = ""
        with contextlib.suppress(OSError):  # it has just ended
            command = Path(f"/proc/{child}/comm").read_text().strip()
        below = _running_steps(child) if command in _SHELLS else []
        found += below or [child]
    return found


def _children(parent: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += [int(child) for child in task.read_text().split()]
    return children
