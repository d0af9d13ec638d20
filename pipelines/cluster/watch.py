"""A run on a cluster, followed until it ends: on a terminal a table drawn in place, in a log a line a change."""

import time
from collections.abc import Sequence

from components.exit_codes import Stopped
from pipelines.cluster.metrics import LastMetrics
from pipelines.cluster.result import result
from pipelines.cluster.run_view import Backend, RunView
from pipelines.cluster.table import ChangeLog, StepTable, clock, table_lines
from tuneloop.errors import TryAgain, TuneloopError

POLL_SECONDS = 5.0


class RunFailed(TuneloopError):
    """The run ended with an exit code other than 0 and 3."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def follow(backend: Backend, run: RunView, look: str, show: bool, poll_seconds: float | None = None) -> int:
    """Wait until the run ends.

    Args:
        look: the command that shows the run again.
        show: draw its steps meanwhile.

    Returns:
        0 or 3, as the gate said.

    Raises:
        RunFailed: with the exit code of the step that failed.
        TryAgain: somebody stopped the waiting, or the server is gone; the run goes on.
    """
    import sys

    metrics = LastMetrics(run.output_uri)
    view = StepTable(sys.stdout) if sys.stdout.isatty() else ChangeLog(sys.stdout)
    try:
        while True:
            run = backend.refresh(run)
            if show:
                view.draw(run, metrics.of(run))
            if run.has_ended:
                break
            time.sleep(POLL_SECONDS if poll_seconds is None else poll_seconds)
    except Stopped:
        raise Stopped(f"no longer waiting; the run goes on, look again with: {look} --watch") from None
    except TryAgain as error:
        raise TryAgain(f"{error}; the run goes on, look again with: {look} --watch") from None
    code, line = result(run)
    if code not in (0, 3):
        raise RunFailed(line, code)
    print(line, flush=True)
    return code


def show_once(backend: Backend, run: RunView) -> None:
    """Print the run as it is now."""
    print("\n".join(table_lines(run, LastMetrics(run.output_uri).of(run))))
    print(f"console: {backend.link(run)}")
    if run.output_uri:
        print(f"output: {run.output_uri}")
    if run.has_ended:
        print(result(run)[1])


def listing(runs: Sequence[RunView]) -> str:
    """The newest runs, a line each."""
    if not runs:
        return "there are no runs yet"
    width = max(len(run.name) for run in runs)
    lines = [f"{'run':<{width}}  {'state':<10}  {'started (UTC)':<16}  took"]
    for run in runs:
        began = f"{run.created:%Y-%m-%d %H:%M}" if run.created else ""
        took = clock((run.ended - run.created).total_seconds()) if run.ended and run.created else ""
        lines.append(f"{run.name:<{width}}  {run.state:<10}  {began:<16}  {took}".rstrip())
    return "\n".join(lines)
