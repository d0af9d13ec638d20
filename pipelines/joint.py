"""Several runs at once: each its own run folder and verdict, but one lora_rl over one copy of the base for all.

Every run is prepared up to its warm-up, all are trained together, and then each one's pipeline is run: it finds those
steps finished and goes on behind them. So each run is a run like any other, and can be resumed alone.
"""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from components.config import RunConfig
from components.lora_rl.joint import require_one_base
from pipelines.local import run_command, run_locally
from pipelines.steps import STEPS
from tuneloop.errors import TryAgain, TuneloopError, UserError

Run = tuple[RunConfig, Path]


def require_joint(configs: Sequence[RunConfig]) -> None:
    """Refuse several runs that cannot be made together.

    Raises:
        UserError: in one line, which of them and why.
    """
    if len(configs) == 1:
        return
    require_one_base(configs)
    for config in configs:
        if config.retrain.skip_unchanged:
            raise UserError(f"{config.name}: retrain.skip_unchanged ends a run by itself, and several runs are trained "
                            "together: set it to false, or run it apart")  # fmt: skip
    targets = [f"{config.promote.registry}/{config.promote.adapter_name}" for config in configs]
    for target in targets:
        if targets.count(target) > 1:
            raise UserError(f"two runs promote to {target}: give each its own promote.adapter_name")


def run_jointly(runs: Sequence[Run]) -> int:
    """Run all pipelines, their training together; returns the exit code.

    Raises:
        TuneloopError: of the first step that failed; in training, it keeps all runs from going on.
        TryAgain: stopped, with everything saved.
    """
    from pipelines.summary import exit_code, report_after_failure, summary

    again = "continue with: python -m pipelines run " + " ".join(f"--resume {shlex.quote(str(f))}" for _, f in runs)
    failed: dict[Path, TuneloopError] = {}
    try:
        train_together(runs)
        failed = complete_each(runs)
    except TryAgain as error:
        raise TryAgain(f"{error}; {again}") from None
    except TuneloopError as error:
        failed = {folder: error for _, folder in runs}
    for config, folder in runs:
        print(f"── {config.name} {'─' * (76 - len(config.name))}")
        if folder in failed:
            report_after_failure(str(folder))  # the pipeline's own one was made before the cause was known
        else:
            print(summary(folder, str(folder)), flush=True)
    if failed:
        print(f"once the cause is gone, {again}", flush=True)
        raise next(iter(failed.values()))
    return max(exit_code(folder) for _, folder in runs)


def train_together(runs: Sequence[Run]) -> None:
    """Everything up to lora_rl, of all runs; what is finished already is not repeated.

    Raises:
        TuneloopError: of the first step that failed, its run named.
        TryAgain: stopped, with everything saved.
    """
    from pipelines.preparation import preparation

    for config, folder in runs:
        print(f"run: {folder}", flush=True)
        if not (folder / "sft_warmup").exists():
            with _named(config):
                run_locally(config, str(folder), preparation)
    if all((folder / "lora_rl").exists() for _, folder in runs):
        return
    command = ["-m", "components.lora_rl.joint", "--record-failures"]
    for _, folder in runs:
        command += ["--config", str(folder / "config.json"), "--output", str(folder / "lora_rl")]
        for name, step in STEPS["lora_rl"].items():
            command += [f"--{name}", str(folder / step)]
    run_command(command, "lora_rl", [folder for _, folder in runs])


@contextlib.contextmanager
def _named(config: RunConfig) -> Iterator[None]:
    """Errors say which run they are of."""
    try:
        yield
    except TryAgain:
        raise
    except TuneloopError as error:
        error.args = (f"{config.name}: {error}",)
        raise


def complete_each(runs: Sequence[Run]) -> dict[Path, TuneloopError]:
    """The rest of every run's pipeline; returns what failed, which does not keep the others from their verdict.

    Raises:
        TryAgain: stopped.
    """
    failed: dict[Path, TuneloopError] = {}
    for config, folder in runs:
        print(f"run: {folder}", flush=True)
        try:
            with _named(config):
                run_locally(config, str(folder))
        except TryAgain:
            raise
        except TuneloopError as error:
            failed[folder] = error
    return failed
