"""Run folders: making one, finding one again, and what of it a changed config or `--from` leaves valid."""

import contextlib
import importlib
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from components.config import RunConfig, load_run_config
from components.lock import exclusive_lock
from components.mirror import FINGERPRINT
from components.result import StepResult
from components.runner import Step, step_fingerprint
from pipelines.steps import STEPS
from tuneloop.config import apply_overrides, config_digest, parse_config, read_config_file, resolved_json
from tuneloop.errors import UserError
from tuneloop.storage import local_path, write_file


def create_run(config: RunConfig, output: str, name: str | None = None) -> Path:
    """Make a new run folder with its `config.json`.

    Args:
        output: the folder of all runs.
        name: the run's name; None for `<config name>-<UTC time>-<config digest>`, made unique.

    Raises:
        UserError: the name is taken or no folder name, or `output` cannot be written.
    """
    runs = local_path(output)
    wanted = run_name(config, name)
    try:
        folder = _make_folder(runs, wanted, unique=name is None)
        with _removed_on_failure(folder):
            write_file(str(folder / "config.json"), resolved_json(config).encode())
    except FileExistsError:
        raise UserError(
            f"{runs / wanted}: exists; continue it with --resume {runs / wanted}, or name another"
        ) from None
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); choose another folder") from None
    return folder


def run_name(config: RunConfig, name: str | None) -> str:
    """The name that was asked for, or `<config name>-<UTC time>-<config digest>`.

    Raises:
        UserError: the name cannot name a folder.
    """
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise UserError(
            f"--run {name!r}: use letters, digits, '.', '_' and '-' only, and start with one of the first two"
        )
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return name or f"{config.name}-{stamp}-{config_digest(config)[:6]}"


def _make_folder(runs: Path, wanted: str, unique: bool) -> Path:
    runs.mkdir(parents=True, exist_ok=True)
    folder, number = runs / wanted, 1
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if not unique:
                raise
            number += 1
            folder = runs / f"{wanted}-{number}"


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def find_run(run: str, output: str) -> Path:
    """The folder of a run that is named by its path, or by its name under `output`.

    Raises:
        UserError: there is none.
    """
    if found := _found(run, output):
        return found
    known = sorted(path.parent.name for path in local_path(output).glob("*/config.json"))
    hint = f"runs in {output}: {', '.join(known[-3:])}" if known else f"{output} holds no runs"
    raise UserError(f"{run}: no such run; {hint}")


def is_run(run: str, output: str) -> bool:
    """Whether `find_run` finds it."""
    return _found(run, output) is not None


def _found(run: str, output: str) -> Path | None:
    folders = (local_path(run), local_path(output) / run)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Be the only process that runs the pipeline into `folder`.

    Raises:
        UserError: another one is at it.
    """
    with exclusive_lock(folder / ".lock", holds=str(folder)):
        yield


@contextlib.contextmanager
def run_locks(folders: Sequence[Path]) -> Iterator[None]:
    """`run_lock` of several folders.

    Raises:
        UserError: another one is at it, or one folder is named twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{folders[0]}: is named twice; name each run once")
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(run_lock(folder))
        yield


@contextlib.contextmanager
def create_runs(configs: Sequence[RunConfig], output: str, names: Sequence[str] | None) -> Iterator[list[Path]]:
    """Make a new run folder for each config, all or none, and hold their locks; see `create_run`."""
    if names and len(set(names)) < len(names):
        raise UserError(f"--run {names[0]}: is named twice; give each run a name of its own")
    folders: list[Path] = []
    try:
        for number, config in enumerate(configs):
            folders.append(create_run(config, output, names[number] if names else None))
    except UserError:
        for folder in folders:
            shutil.rmtree(folder)
        raise
    with run_locks(folders):
        yield folders


def resume_config(folder: Path, overrides: tuple[str, ...], start: str | None) -> RunConfig:
    """The config that a run goes on with; nothing is written yet.

    Args:
        overrides: `section.key=value` on top of the config that the run was started with.
        start: the first step that is to run again; None: the first one that is not finished.

    Raises:
        UserError: the config is refused, or it would change what an earlier step made.
    """
    path = folder / "config.json"
    if not overrides:
        return load_run_config(path)
    config = parse_config(RunConfig, apply_overrides(read_config_file(path), overrides), origin=f"{path} and --set")
    kept = _before(start)
    changed = [name for name in kept if name != "check" and _made_from_other_settings(folder, name, config)]
    if changed:
        raise UserError(
            f"--set {' '.join(overrides)} changes what {changed[0]} has made in {folder}; "
            f"add --from {changed[0]} to run it again, or start a new run"
        )
    return config


def _before(start: str | None) -> list[str]:
    names = list(STEPS)
    return names[: names.index(start)] if start else names


def _made_from_other_settings(folder: Path, name: str, config: RunConfig) -> bool:
    mark = folder / f"{name}.partial" / FINGERPRINT
    if (folder / name).exists():
        made_from = StepResult.read(folder / name).fingerprint
    elif mark.exists():
        made_from = mark.read_text()
    else:
        return False
    step: Step = importlib.import_module(f"components.{name}.step").STEP
    inputs = {key: folder / source for key, source in STEPS[name].items() if (folder / source).exists()}
    return made_from != step_fingerprint(step, config, inputs)


def clear(folder: Path, start: str | None, config: RunConfig) -> list[Path]:
    """Write the config that the run goes on with, and remove what is to be made again.

    That is everything from the step `start` on, the report, and the check when the config has changed.

    Returns:
        The paths that were removed.

    Raises:
        UserError: the disk refuses the config; nothing is removed.
    """
    resolved = resolved_json(config)
    again = list(STEPS)[list(STEPS).index(start) :] if start else []
    if (folder / "config.json").read_text() != resolved:
        again = ["check", *again]
        try:
            write_file(str(folder / "config.json"), resolved.encode())
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}; free space, or mend the folder's rights") from None
    parts = [f"{name}{suffix}" for name in dict.fromkeys(again) for suffix in ("", ".partial", ".failed.json")]
    removed = [folder / part for part in [*parts, *(["report", "report.json"] if start else [])]]
    removed = [path for path in removed if path.exists()]
    for path in removed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return removed
