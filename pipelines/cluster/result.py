"""What a run on a cluster came to, read from its folder in the object store."""

import json
from pathlib import Path
from typing import Any

from components.failures import failures
from pipelines.cluster.run_view import CANCELLED, SUCCEEDED, RunView
from pipelines.steps import NODES
from tuneloop.errors import EXIT_GATE_REFUSED, EXIT_OK, EXIT_TRY_AGAIN, TuneloopError, UserError
from tuneloop.storage import NotFound, join_uri, read_file

_FAILED = 1


def result(run: RunView) -> tuple[int, str]:
    """The exit code of a run that has ended, and one line that says why.

    A store that cannot be read from here leaves what the cluster says.
    """
    if run.state == CANCELLED:
        return EXIT_TRY_AGAIN, "the run was cancelled; the same submit continues it"
    try:
        return _succeeded(run) if run.state == SUCCEEDED else _failed(run)
    except TuneloopError as error:
        unread = f"its folder cannot be read from here: {error}"
        if run.state == SUCCEEDED:
            return EXIT_OK, f"the run succeeded; {unread}"
        return _FAILED, f"the run failed{_said(run)}; {unread}"


def _succeeded(run: RunView) -> tuple[int, str]:
    try:
        told: dict[str, Any] = json.loads(read_file(join_uri(run.output_uri, "report.json")))
    except NotFound:
        return EXIT_OK, "the run succeeded; it has left no report"
    gate = told.get("gate") or {}
    if told.get("status") == "kept":
        return EXIT_GATE_REFUSED, f"gate: not passed: {gate.get('reason', '')}; the incumbent is kept"
    if told.get("status") == "promoted":
        return EXIT_OK, f"gate: passed: {gate.get('reason', '')}; promoted"
    if told.get("status") == "skipped":
        return EXIT_OK, "the run succeeded and had nothing to train on: the data is unchanged"
    return EXIT_OK, "the run succeeded; its report is of an earlier attempt"


def _failed(run: RunView) -> tuple[int, str]:
    found = failures(run.output_uri, NODES)
    failed_here = [failure for failure in found if _may_be_of(run, failure.step)]
    if not failed_here:
        return _FAILED, f"the run failed{_said(run)}; the log of its last step says why"
    failure = failed_here[0]
    return failure.exit_code or _FAILED, f"{failure.step}: {failure.message}"


def _may_be_of(run: RunView, step: str) -> bool:
    """Whether a record of a failure may be this attempt's: of a step that it has begun, if the cluster tells."""
    return not run.steps or step in run.steps


def _said(run: RunView) -> str:
    return f" ({' '.join(run.message.split())[:300]})" if run.message else ""


def fetch_report(run: RunView, to: Path | None) -> Path:
    """Copy the run's report into a local file, as far as the run got; the store is left as it is.

    Raises:
        UserError: the run has no folder, there is nothing in it yet, or the file cannot be written.
        TryAgain: the store is unavailable.
    """
    if not run.output_uri:
        raise UserError(f"{run.name}: was started without output_uri, so it has no report")
    path = to or Path(f"{run.name}.html")
    try:
        content = read_file(join_uri(run.output_uri, "report/report.html"))
    except NotFound:
        from tuneloop.report import build_report, fetched_run

        with fetched_run(run.output_uri) as folder:
            content = build_report(folder).html.read_bytes()
    try:
        path.write_bytes(content)
    except OSError as error:
        raise UserError(f"--to {path}: cannot be written ({error.strerror}); name another file") from None
    return path
