"""Starting the processes that train one adapter together: torchrun, its noise and its orphans taken away.

The step (parent) starts this module as a process of its own, which starts and watches the children by torchrun's own
API (`torch.distributed.launcher`), and so passes SIGTERM on to them, ends them all when one fails, and kills those that
do not end. Each child leaves its outcome in a file; the parent turns them into the one that the user sees. Whoever
starts children by `torchrun` itself gets the same children.
"""

import contextlib
import ctypes
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from tuneloop.errors import EXIT_OK, EXIT_TRY_AGAIN, EXIT_USER_ERROR, TryAgain, TuneloopError, UserError
from tuneloop.process import peak_rss_bytes
from tuneloop.training.nodes import Nodes
from tuneloop.training.settings import DistributedSettings

OUTCOMES = "TUNELOOP_OUTCOMES"  # names the folder of the outcomes in a child's environment
_KILLED = "killed"  # a file there: the signals that ended children, by rank
# What children that were asked to stop say of themselves; one that had not got as far as to listen makes others fail.
_OF_STOPPING = (EXIT_OK, EXIT_USER_ERROR, EXIT_TRY_AGAIN)
_SECONDS_TO_MEET = 1800  # for the slowest of several machines to fetch its inputs
_SECONDS_TO_LEAVE = 10  # beyond the grace: for saving and for leaving the group
_PR_SET_PDEATHSIG = 1


class ProcessFailed(TuneloopError):
    """One of the processes ended by a bug or from outside; its own output says more."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        rank: which child.
        exit_code: see `tuneloop.errors`.
        message: one line, when it failed.
        trace: the traceback of a bug.
        summary: what the work returned.
        peak_rss_bytes: the most memory that it held.
        at: when, by the machine's clock.
    """

    rank: int
    exit_code: int
    message: str
    trace: str
    summary: dict[str, Any]
    peak_rss_bytes: int
    at: float


@dataclass(frozen=True)
class _Plan:
    """What the launcher's process is told: how many children, the seconds they have to leave, and `Nodes`' fields."""

    count: int
    seconds: int
    nodes: dict[str, Any]


def process_count(settings: DistributedSettings) -> int:
    """How many processes the settings mean on this machine.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count()
    if settings.processes == "auto":
        return max(1, gpus)
    if gpus and settings.processes > gpus:
        raise UserError(f"lora_rl.distributed.processes = {settings.processes}, but there are {gpus} GPUs; "
                        'ask for that many, or set it to "auto"')  # fmt: skip
    return settings.processes


def refuse_missing_deepspeed() -> None:
    """Say so when several processes are wanted and DeepSpeed is not installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError("lora_rl.distributed asks for several processes or for offloading, which needs DeepSpeed: "
                        "pip install 'tuneloop[deepspeed]', or set processes = 1")  # fmt: skip


def run_processes(
    command: Sequence[str], count: int, grace_seconds: float, nodes: Nodes | None = None
) -> list[Outcome]:
    """Run `python <command>` as `count` processes that can find each other, and wait for all of them.

    Args:
        command: must call `take_part`.
        count: of this machine.
        grace_seconds: from SIGTERM until a child is killed.
        nodes: the machines that do the same, each for its own processes.

    Returns:
        The outcomes of this machine's processes, by rank; all succeeded.

    Raises:
        UserError, TryAgain, ProcessFailed: what made the first one fail.
    """
    with tempfile.TemporaryDirectory(prefix="tuneloop-") as folder:
        plan = _Plan(count, int(grace_seconds) + _SECONDS_TO_LEAVE, asdict(nodes or Nodes()))
        launcher = [sys.executable, "-m", __name__, json.dumps(asdict(plan)), *command]
        # In a session of its own: a terminal's Ctrl-C reaches the step alone, which passes it on.
        environment = _environment(count, folder)
        process = subprocess.Popen(launcher, env=environment, start_new_session=True)
        stopped = _wait(process)
        found = [Outcome(**json.loads(path.read_text())) for path in Path(folder).glob("*.json")]
        killed = Path(folder) / _KILLED
        signals = json.loads(killed.read_text()) if killed.exists() else {}
    outcomes = sorted(found, key=lambda outcome: outcome.rank)
    if stopped:
        outcomes = [outcome for outcome in outcomes if outcome.exit_code in _OF_STOPPING]
    return _judged(outcomes, {} if stopped else signals, count)


def _wait(process: subprocess.Popen) -> bool:
    """Wait for the launcher; a request to stop is passed on once, and a later one ends the children at once.

    Returns:
        Whether there was such a request.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            process.wait()
            return number == signal.SIGKILL
        except TryAgain:  # out of the step's signal handler
            process.send_signal(number)
        except BaseException:
            process.kill()  # the children die with it
            process.wait()
            raise
    process.wait()
    return True


def _environment(count: int, folder: str) -> dict[str, str]:
    environment = {**os.environ, OUTCOMES: folder, "TMPDIR": folder, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _judged(outcomes: list[Outcome], signals: Mapping[str, int], count: int) -> list[Outcome]:
    """Raise for what came first; the others then failed for want of it."""
    failed = sorted((outcome for outcome in outcomes if outcome.exit_code != EXIT_OK), key=lambda outcome: outcome.at)
    for outcome in failed:
        if outcome.exit_code == EXIT_USER_ERROR:
            raise UserError(outcome.message)
    for rank, number in signals.items():
        raise ProcessFailed(f"process {rank} of {count} was killed by {signal.Signals(number).name} (for its memory?); "
                            "the same command continues from the newest checkpoint")  # fmt: skip
    for outcome in failed:
        if outcome.exit_code != EXIT_TRY_AGAIN:
            print(outcome.trace, end="", file=sys.stderr, flush=True)
            raise ProcessFailed(outcome.message)
    if failed:
        raise TryAgain(failed[0].message)
    if len(outcomes) < count:
        raise TryAgain("stopped before all processes were there; the same command continues from the newest checkpoint")
    return outcomes


def take_part(settings: DistributedSettings, work: Callable[[], dict[str, Any]]) -> int:
    """Run `work` in the group of processes that torchrun's environment describes; returns the exit code.

    Only the first process's standard output is shown. A process that fails leaves without waiting for the others, whom
    its closed connections wake.
    """
    _die_with_parent()
    rank = int(os.environ["RANK"])
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process's life
    try:
        with _group(settings):
            summary = work()
        code, message, trace = EXIT_OK, "", ""
    except TuneloopError as error:
        code, message, trace, summary = error.exit_code, str(error), "", {}
    except Exception as error:
        message = " ".join(f"process {rank}: {type(error).__name__}: {error}".split())
        code, trace, summary = 1, traceback.format_exc(), {}
    folder = os.environ.get(OUTCOMES)
    if folder:
        outcome = Outcome(rank, code, message, trace, summary, peak_rss_bytes(), time.time())
        partial = Path(folder) / f"{rank}.partial"
        partial.write_text(json.dumps(asdict(outcome)))
        partial.rename(Path(folder) / f"{rank}.json")
    elif code != EXIT_OK:
        print(f"{trace}error: {message}", file=sys.stderr, flush=True)
    if code != EXIT_OK:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what destroys a group waits for the processes that are in an exchange
    return code


@contextlib.contextmanager
def _group(settings: DistributedSettings) -> Iterator[None]:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(
        "nccl" if on_gpu else "gloo", timeout=timedelta(seconds=settings.timeout_seconds)
    )
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1 and os.environ.get(OUTCOMES):
        os._exit(EXIT_TRY_AGAIN)  # it was gone before we asked


def _main(arguments: Sequence[str]) -> int:
    """The launcher's process: `<plan> <command…>`."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _die_with_parent()
    logging.disable(logging.CRITICAL)  # the outcomes say what happened
    plan, command = _Plan(**json.loads(arguments[0])), arguments[1:]
    nodes = Nodes(**plan.nodes)
    config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=plan.count,
        run_id="tuneloop" if nodes.count > 1 else f"tuneloop-{os.getpid()}",
        rdzv_backend="static" if nodes.count > 1 else "c10d",
        rdzv_endpoint=nodes.rendezvous,
        rdzv_configs={"rank": nodes.rank, "timeout": _SECONDS_TO_MEET} if nodes.count > 1 else {},
        max_restarts=0,
        shutdown_timeout=plan.seconds,
    )
    try:
        elastic_launch(config, sys.executable)("-u", *command)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        killed = {
            rank: -failure.exitcode
            for rank, failure in error.failures.items()
            # By somebody else: we send SIGTERM to those that are left, and long afterwards SIGKILL.
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and failure.timestamp <= first.timestamp + 1
        }
        (Path(os.environ[OUTCOMES]) / _KILLED).write_text(json.dumps(killed))
        return 1  # the outcomes say why
    except SignalException:
        return 1
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
