"""How every step is run: alone (`python -m components.<step>`) or from the pipeline, with the same guarantees.

A step writes into `<output>.partial` and the whole folder is renamed to `<output>` when it is complete, so an output
either exists and is complete, or does not exist. A resumable step finds its partial folder again after a kill; any
other step starts from an empty one. `step.json` in the output records what went in, how long it took and how much
memory it needed.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.config import RunConfig, load_run_config
from tuneloop import __version__
from tuneloop.config import config_digest, resolved_json
from tuneloop.errors import EXIT_OK, EXIT_TRY_AGAIN, TryAgain, TuneloopError, UserError
from tuneloop.storage import local_path

Summary = dict[str, float | int | str | bool | None]


@dataclass(frozen=True)
class Step:
    """One node of the DAG.

    Attributes:
        name: the folder under `components/`, and the folder of its output in a run.
        inputs: names of the input URIs, in the order of the DAG's arrows.
        run: `run(config, inputs, output) -> summary`; `inputs` are local paths, `output` is the folder to fill.
        sections: the config sections that decide the result; others may change without a re-run.
        optional_inputs: inputs that may be missing.
        resumable: the step continues from what it finds in `output` after a kill.
    """

    name: str
    inputs: tuple[str, ...]
    run: Callable[[RunConfig, Mapping[str, Path], Path], Summary]
    sections: tuple[str, ...]
    optional_inputs: tuple[str, ...] = ()
    resumable: bool = False


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
    if target.exists():
        done = StepResult.read(target)
        if done.fingerprint != fingerprint:
            raise UserError(f"{target}: already holds a {done.step} output made from other settings or inputs; "
                            "choose another --output or remove it")  # fmt: skip
        print(f"{step.name}: already done, reusing {target}", flush=True)
        return done
    partial = target.with_name(target.name + ".partial")
    with _exclusive(target), _writable(target):
        if not step.resumable or not _continues(partial, fingerprint):
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "fingerprint").write_text(fingerprint)
        started = time.perf_counter()
        try:
            summary = step.run(config, paths, partial)
        except BaseException:
            if not step.resumable:
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
        (partial / "fingerprint").unlink()
        os.replace(partial, target)
    return result


def step_fingerprint(step: Step, config: RunConfig, inputs: Mapping[str, Path]) -> str:
    """sha256 over the step's config sections, the seed and the fingerprints of the steps that made its inputs."""
    values = config.model_dump(mode="json", include={*step.sections, "seed"})
    upstream = {}
    for name, path in inputs.items():
        with contextlib.suppress(UserError):
            upstream[name] = StepResult.read(path).fingerprint
    text = json.dumps([step.name, values, upstream], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def peak_rss_bytes() -> int:
    """The most memory that this process has held, from the kernel's high-water mark (not inherited over exec)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line")


def main(step: Step, argv: Sequence[str] | None = None) -> int:
    """The command line of `python -m components.<step>`; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m components.{step.name}", description=step.run.__doc__)
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
    result = execute(step, config, {name: getattr(arguments, name) for name in step.inputs}, arguments.output)
    print(f"{step.name}: done in {result.seconds:.1f} s, peak memory {result.peak_rss_bytes / 1e6:,.0f} MB", flush=True)


def exit_code_of(action: Callable[[], object]) -> int:
    """Run `action` and turn its outcome into the shared exit codes; our own errors print one line."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        action()
    except TuneloopError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: stopped; the same command continues where it can", file=sys.stderr, flush=True)
        return EXIT_TRY_AGAIN
    except Exception:
        traceback.print_exc()
        return 1
    return EXIT_OK


def _terminate(signum: int, frame: Any) -> None:
    raise TryAgain("stopped by SIGTERM; the same command continues where it can")


def _existing_input(step: Step, name: str, uri: str) -> Path:
    path = local_path(uri)
    if not path.exists():
        raise UserError(f"--{name.replace('_', '-')} {uri}: does not exist, so {step.name} has nothing to read")
    return path


def _continues(partial: Path, fingerprint: str) -> bool:
    mark = partial / "fingerprint"
    return mark.exists() and mark.read_text() == fingerprint


@contextlib.contextmanager
def _exclusive(target: Path) -> Iterator[None]:
    """Hold the output's lock; the kernel drops it when the process dies."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = open(target.with_name(f".{target.name}.lock"), "w")
    except OSError as error:
        raise UserError(f"{target}: cannot be made ({error.strerror}); choose another output") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{target}: another run is writing it; wait for it or choose another output") from None
        yield


@contextlib.contextmanager
def _writable(target: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in (28, 30, 122):  # ENOSPC, EROFS, EDQUOT
            raise UserError(f"{target}: {os.strerror(error.errno)}; free space or choose another output") from error
        raise
