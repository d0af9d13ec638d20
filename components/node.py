"""A step as a node of the DAG: the pipeline's parameters in, a record of a failure beside the output.

A failure leaves `<step>.failed.json`, because neither kfp.local nor the Pipelines backend hands on an exit code.
"""

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from components.exit_codes import exit_code_of
from components.failures import StepFailure, forget_failure, record_failure
from components.parameters import resolve_parameters
from components.result import StepResult
from components.runner import execute
from tuneloop.errors import EXIT_OK, UserError
from tuneloop.storage import join_uri, read_file, write_file

TICK = "{schedule_time}"
STEP_BEGINS, STEP_ENDS = "==> ", "<== "  # lines that frame a step's output in the pipeline's log


class MetricsSink(Protocol):
    """Where a pipeline's step reports its numbers; `kfp.dsl.Metrics` is one."""

    def log_metric(self, metric: str, value: float) -> None:
        """Record one number under its name."""
        ...


def run_in_pipeline(
    name: str,
    *,
    config: str,
    output_uri: str,
    due: str = "",
    inputs: Mapping[str, str] | None = None,
    parameters: Mapping[str, Any] | None = None,
    metrics: MetricsSink | None = None,
) -> str:
    """Run the step `name` as a node of the DAG, into `<output_uri>/<name>`.

    A failure leaves `<output_uri>/<name>.failed.json`: `{"step", "exit_code", "message"}`.

    Args:
        config: the run's config as JSON.
        output_uri: the run folder; `TICK` in it stands for the time that the run was due.
        due: that time, as the backend gives it.
        inputs: the outputs of the steps that this one reads.
        parameters: pipeline parameters that override the config; see `components.parameters`.
        metrics: receives the numbers of the step's summary.

    Returns:
        The URI of the step's output.

    Raises:
        SystemExit: the step failed, with its exit code.
    """
    run_uri = _run_uri(output_uri, due)
    target = join_uri(run_uri, name)

    def run() -> None:
        step = importlib.import_module(f"components.{name}.step").STEP
        result = execute(step, resolve_parameters(config, parameters or {}), inputs or {}, target)
        _log_metrics(result, metrics)

    exit_code = run_framed(name, run_uri, run)
    if exit_code != EXIT_OK:
        raise SystemExit(exit_code)
    return target


def due_time(due: str) -> str:
    """When a run was due, as the backend tells; empty where it tells nothing or leaves its placeholder."""
    return "" if due.startswith("{{") else due


def run_folder(output_uri: str, due: str) -> str:
    """The run folder that a pipeline's `output_uri` names: each tick of a schedule has its own, by `TICK`.

    Raises:
        UserError: it is empty, or names a tick where there is none.
    """
    if not output_uri:
        raise UserError("output_uri: is empty; name the run folder, such as s3://bucket/runs/first")
    if TICK not in output_uri:
        return output_uri
    try:
        time = datetime.fromisoformat(due_time(due))
    except ValueError:
        raise UserError(
            f"output_uri {output_uri}: {TICK} is the time of a schedule's tick, and this run has none; name a folder"
        ) from None
    return output_uri.replace(TICK, time.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ"))


def _run_uri(output_uri: str, due: str) -> str:
    try:
        return run_folder(output_uri, due)
    except UserError as error:  # there is no folder yet to record it in
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_code) from None


def run_framed(name: str, run_uri: str, action: Callable[[], object]) -> int:
    """Run a node between the two lines that frame its output, and record its failure beside its output.

    Returns:
        The exit code.
    """
    print(f"{STEP_BEGINS}{name}", flush=True)

    def start() -> None:
        forget_failure(run_uri, name)
        action()

    exit_code = exit_code_of(start, lambda *found: record_failure(run_uri, StepFailure(name, *found)))
    print(f"{STEP_ENDS}{name}", flush=True)
    return exit_code


def publish_config(check_uri: str) -> str:
    """Put the resolved config of a finished check at the top of its run folder, and return it."""
    content = read_file(join_uri(check_uri, "config.json"))
    write_file(join_uri(check_uri.rpartition("/")[0], "config.json"), content)
    return content.decode()


def report_in_pipeline(output_uri: str, due: str, metrics: MetricsSink, page: str, model_card: str) -> str:
    """The pipeline's exit task: build the report of the run folder, as far as the run got, and log its numbers.

    Args:
        page, model_card: files that get a copy, for the console.

    Returns:
        The URI of the report's folder.

    Raises:
        SystemExit: the report could not be made.
    """
    run_uri = _run_uri(output_uri, due)

    def build() -> None:
        from tuneloop.report import report_metrics
        from tuneloop.report.remote import report_of

        with report_of(run_uri) as folder:
            for metric, value in report_metrics(folder).items():
                metrics.log_metric(metric, value)
            shutil.copyfile(folder / "report" / "report.html", page)
            shutil.copyfile(folder / "report" / "model_card.md", model_card)

    exit_code = run_framed("report", run_uri, build)
    if exit_code != EXIT_OK:
        raise SystemExit(exit_code)
    return join_uri(run_uri, "report")


def write_outputs(result: StepResult, folder: Path) -> None:
    """Write each value of a step's summary into a file of its own, as Argo reads output parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in result.summary.items():
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def _log_metrics(result: StepResult, metrics: MetricsSink | None) -> None:
    if metrics is None:
        return
    numbers = {**result.summary, "seconds": result.seconds, "peak_rss_bytes": result.peak_rss_bytes}
    for metric, value in numbers.items():
        if isinstance(value, int | float):
            metrics.log_metric(metric, float(value))
