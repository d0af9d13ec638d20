"""How every step is run: alone (`python -m components.<step>`) or from the pipeline, with the same guarantees.

A step writes into `<output>.partial` and the whole folder is renamed to `<output>` when it is complete, so an output
either exists and is complete, or does not exist. A resumable step finds its partial folder again after a kill; any
other step starts from an empty one. `step.json` in the output records what went in, how long it took and how much
memory it needed. Run by the pipeline, a step that fails leaves `<step>.failed.json` beside its output, because neither
kfp.local nor the Pipelines backend hands on an exit code.
"""

import argparse
import contextlib
import errno
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from components.command_line import CommandLine
from components.config import RunConfig, load_run_config
from components.lock import exclusive_lock
from components.parameters import resolve_parameters
from tuneloop import __version__
from tuneloop.config import config_digest, resolved_json
from tuneloop.errors import EXIT_OK, TryAgain, TuneloopError, UserError
from tuneloop.process import peak_rss_bytes
from tuneloop.storage import local_path
from tuneloop.tracking import tracked
from tuneloop.training.stopping import REPEAT_SECONDS

Summary = dict[str, float | int | str | bool | None]
FINGERPRINT = "fingerprint"  # in a partial output: what it is being made from
CHECKPOINTS = "checkpoints"  # in a resumable step's partial output: without it there is nothing worth keeping
STEP_BEGINS, STEP_ENDS = "==> ", "<== "  # lines that frame a step's output in the pipeline's log


@dataclass(frozen=True)
class Step:
    """One node of the DAG.

    Attributes:
        name: the folder under `components/`, and the folder of its output in a run.
        inputs: names of the input URIs, in the order of the DAG's arrows.
        run: `run(config, inputs, output) -> summary`; `inputs` are local paths, `output` is the folder to fill.
        sections: the config sections that decide the result; others may change without a re-run.
        optional_inputs: inputs that may be missing.
        resumable: the step continues from what it finds under `checkpoints/` in `output` after a kill.
        indifferent: settings, as `section.key`, that say where and how it runs but not what it computes: they may
            change between two runs of a resumable step.
    """

    name: str
    inputs: tuple[str, ...]
    run: Callable[[RunConfig, Mapping[str, Path], Path], Summary]
    sections: tuple[str, ...]
    optional_inputs: tuple[str, ...] = ()
    resumable: bool = False
    indifferent: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """What a finished step left behind; the content of `step.json`."""

    step: str
    fingerprint: str
    seconds: float
    peak_rss_bytes: int
    summary: Summary
    config_digest: str
    inputs: dict[str, str] = field(default_factory=dict)
    code_version: str = __version__
    finished_at: str = ""

    @classmethod
    def read(cls, output: Path) -> "StepResult":
        """The result that `output` holds.

        Raises:
            UserError: the folder was not made by a step of ours.
        """
        try:
            return cls(**json.loads((output / "step.json").read_text()))
        except (OSError, json.JSONDecodeError, TypeError):
            raise UserError(f"{output}: holds no finished step (no readable step.json); name another folder") from None


def execute(step: Step, config: RunConfig, inputs: Mapping[str, str], output: str) -> StepResult:
    """Run a step, or find that this very step has already been run into `output`.

    Raises:
        UserError: an input is missing, the output holds something else, or another process is writing it.
        TryAgain: the step was told to stop and has saved its state.
    """
    target = local_path(output)
    paths = {name: _existing_input(step, name, inputs[name]) for name in step.inputs if inputs.get(name)}
    fingerprint = step_fingerprint(step, config, paths)
    partial = target.with_name(target.name + ".partial")
    with _exclusive(target), _writable(target):
        if target.exists():
            return _finished_before(step, target, fingerprint)
        if not step.resumable or not _continues(partial, fingerprint):
            if step.resumable and partial.exists():
                print(f"{step.name}: {partial} was made from other settings or inputs; starting over", flush=True)
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        (partial / FINGERPRINT).write_text(fingerprint)
        started = time.perf_counter()
        try:
            with _tracked(step, config, partial, target):
                summary = step.run(config, paths, partial)
        except BaseException:
            if not step.resumable or not (partial / CHECKPOINTS).is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        result = StepResult(
            step=step.name,
            fingerprint=fingerprint,
            seconds=round(time.perf_counter() - started, 3),
            peak_rss_bytes=peak_rss_bytes(),
            summary=summary,
            config_digest=config_digest(config),
            inputs={name: str(path) for name, path in paths.items()},
            finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        (partial / "config.json").write_text(resolved_json(config))
        (partial / "step.json").write_text(json.dumps(result.__dict__, indent=2) + "\n")
        (partial / FINGERPRINT).unlink()
        os.replace(partial, target)
        shutil.rmtree(target / CHECKPOINTS, ignore_errors=True)  # they served to get here, and are large
    memory = result.peak_rss_bytes / 1e6
    print(f"{step.name}: done in {result.seconds:.1f} s, peak memory {memory:,.0f} MB", flush=True)
    return result


def _tracked(step: Step, config: RunConfig, partial: Path, target: Path) -> contextlib.AbstractContextManager[None]:
    if not step.resumable:  # only training logs metrics
        return contextlib.nullcontext()
    group = target.resolve().parent.name or config.name
    return tracked(config.tracking, partial, group=group, step=step.name, resolved=config.model_dump(mode="json"))


def _finished_before(step: Step, target: Path, fingerprint: str) -> StepResult:
    done = StepResult.read(target)
    if done.fingerprint != fingerprint:
        what = f"already holds a {done.step} output made from other settings or inputs"
        raise UserError(f"{target}: {what}; choose another --output or remove it")
    print(f"{step.name}: already done, reusing {target}", flush=True)
    return done


def step_fingerprint(step: Step, config: RunConfig, inputs: Mapping[str, Path]) -> str:
    """sha256 over the step's config sections, the seed and the fingerprints of the steps that made its inputs."""
    values = config.model_dump(mode="json", include={*step.sections, "seed"})
    for setting in step.indifferent:
        section, _, key = setting.partition(".")
        del values[section][key]
    upstream = {}
    for name, path in inputs.items():
        with contextlib.suppress(UserError):
            upstream[name] = StepResult.read(path).fingerprint
    text = json.dumps([step.name, values, upstream], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def main(step: Step, argv: Sequence[str] | None = None) -> int:
    """The command line of `python -m components.<step>`; returns the exit code."""
    parser = CommandLine(prog=f"python -m components.{step.name}", description=step.run.__doc__)
    parser.add_argument("--config", required=True, help="the run's TOML, or resolved JSON")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    for name in step.inputs:
        required = name not in step.optional_inputs
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, required=required, metavar="URI")
    parser.add_argument("--output", required=True, metavar="PATH", help="the folder to make")
    arguments = parser.parse_args(argv)
    return exit_code_of(lambda: _run_from_command_line(step, arguments))


def _run_from_command_line(step: Step, arguments: argparse.Namespace) -> None:
    config = load_run_config(arguments.config, tuple(arguments.set))
    execute(step, config, {name: getattr(arguments, name) for name in step.inputs}, arguments.output)


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
    inputs: Mapping[str, str] | None = None,
    parameters: Mapping[str, Any] | None = None,
    metrics: MetricsSink | None = None,
) -> str:
    """Run the step `name` as a node of the DAG, into `<output_uri>/<name>`.

    A failure leaves `<output_uri>/<name>.failed.json`: `{"step", "exit_code", "message"}`.

    Args:
        config: the run's config as JSON.
        output_uri: the run folder.
        inputs: the outputs of the steps that this one reads.
        parameters: pipeline parameters that override the config; see `components.parameters`.
        metrics: receives the numbers of the step's summary.

    Returns:
        The URI of the step's output.

    Raises:
        SystemExit: the step failed, with its exit code.
    """
    target = f"{output_uri.rstrip('/')}/{name}"

    def run() -> None:
        step = importlib.import_module(f"components.{name}.step").STEP
        result = execute(step, resolve_parameters(config, parameters or {}), inputs or {}, target)
        _log_metrics(result, metrics)

    _run_framed(name, output_uri, run)
    return target


def _run_framed(name: str, output_uri: str, action: Callable[[], None]) -> None:
    """Run a node between the two lines that frame its output, and record its failure beside its output."""
    print(f"{STEP_BEGINS}{name}", flush=True)
    run_folder = local_path(output_uri)

    def start() -> None:
        _failure_file(run_folder, name).unlink(missing_ok=True)
        action()

    exit_code = exit_code_of(start, lambda code, message: record_failure(run_folder, name, code, message))
    print(f"{STEP_ENDS}{name}", flush=True)
    if exit_code != EXIT_OK:
        raise SystemExit(exit_code)


def record_failure(run_folder: Path, step: str, exit_code: int, message: str) -> None:
    """Write `<step>.failed.json`: `{"step", "exit_code", "message"}`."""
    with contextlib.suppress(OSError):  # a full or read-only disk: the line on stderr has to do
        record = {"step": step, "exit_code": exit_code, "message": message}
        _failure_file(run_folder, step).write_text(json.dumps(record) + "\n")


def _failure_file(run_folder: Path, step: str) -> Path:
    return run_folder / f"{step}.failed.json"


def publish_config(check_uri: str, output_uri: str) -> str:
    """Put the resolved config of a finished check at the top of the run folder, and return it."""
    text = (local_path(check_uri) / "config.json").read_text()
    (local_path(output_uri) / "config.json").write_text(text)
    return text


def report_in_pipeline(output_uri: str, metrics: MetricsSink) -> Path:
    """The pipeline's exit task: build the report of the run folder, as far as the run got, and log its numbers.

    Raises:
        SystemExit: the report could not be made.
    """
    run_folder = local_path(output_uri)

    def build() -> None:
        from tuneloop.report import build_report, report_metrics

        build_report(run_folder)
        for metric, value in report_metrics(run_folder).items():
            metrics.log_metric(metric, value)

    _run_framed("report", output_uri, build)
    return run_folder / "report"


def _log_metrics(result: StepResult, metrics: MetricsSink | None) -> None:
    if metrics is None:
        return
    numbers = {**result.summary, "seconds": result.seconds, "peak_rss_bytes": result.peak_rss_bytes}
    for metric, value in numbers.items():
        if isinstance(value, int | float):
            metrics.log_metric(metric, float(value))


def exit_code_of(action: Callable[[], object], on_failure: Callable[[int, str], None] = lambda *_: None) -> int:
    """Run `action` and turn its outcome into the shared exit codes; our own errors print one line.

    Args:
        action: what to run; SIGINT and SIGTERM raise `TryAgain` in it.
        on_failure: called with the exit code and one line that says why.
    """
    try:
        with stop_on_signals():
            action()
    except TuneloopError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        on_failure(error.exit_code, str(error))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        on_failure(1, " ".join(f"{type(error).__name__}: {error}".split()))
        return 1
    return EXIT_OK


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise `TryAgain` inside; a repeat within `REPEAT_SECONDS` is the same request."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread receives signals
        return
    asked_at = float("-inf")

    def stop(signum: int, frame: Any) -> None:
        nonlocal asked_at
        if time.monotonic() - asked_at < REPEAT_SECONDS:
            return
        asked_at = time.monotonic()
        raise TryAgain(f"stopped by {signal.Signals(signum).name}; the same command continues where it can")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _existing_input(step: Step, name: str, uri: str) -> Path:
    path = local_path(uri)
    if not path.exists():
        raise UserError(f"--{name.replace('_', '-')} {uri}: does not exist, so {step.name} has nothing to read")
    return path


def _continues(partial: Path, fingerprint: str) -> bool:
    mark = partial / FINGERPRINT
    return mark.exists() and mark.read_text() == fingerprint


@contextlib.contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Hold the output's lock; the kernel drops it when the process dies."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror}); choose another output") from None
    with exclusive_lock(target.with_name(f".{target.name}.lock"), holds=str(target)):
        yield


@contextlib.contextmanager
def _writable(target: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG):
            raise UserError(f"{target}: {os.strerror(error.errno)}; free space or choose another output") from error
        raise
