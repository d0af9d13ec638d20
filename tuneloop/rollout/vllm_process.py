"""The child process that vLLM runs in, as its parent sees it: start, ask, notice its death.

vLLM takes memory, threads, signal handlers and the log for itself, and may die of a driver's fault; in a process of its
own none of that is the trainer's. Messages are JSON over a socket that only the two have.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import tuneloop
from tuneloop.errors import EXIT_TRY_AGAIN, TuneloopError, UserError

# What torchrun tells its processes would make vLLM join the trainer's group; its allocator cannot sleep with the other.
_NOT_FOR_VLLM = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
                 "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "PYTORCH_CUDA_ALLOC_CONF",
                 "PYTORCH_ALLOC_CONF")  # fmt: skip

_LONGEST_END = 10.0  # seconds until killed processes are gone


class EngineDied(TuneloopError):
    """The engine's process is gone, hangs or is of no more use; the same run may go on with a new one."""

    exit_code = EXIT_TRY_AGAIN


class EngineProcess:
    """One vLLM, started with `options`; see `vllm_worker` for what it can be asked.

    Args:
        options: what the worker starts vLLM with.
        log: file to which the process's output is appended.
        timeout_seconds: of the start and of each request.
        environment: variables beside this process's own.

    Raises:
        UserError: vLLM refuses to start like this.
        EngineDied: it ended while it started.
    """

    def __init__(self, options: Mapping[str, Any], log: Path, timeout_seconds: float, environment: Mapping[str, str]):
        self.log, self._timeout = log, timeout_seconds
        ours, theirs = Pipe()
        inherited = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_VLLM}
        here = str(Path(tuneloop.__file__).parent.parent)
        inherited["PYTHONPATH"] = os.pathsep.join(filter(None, (here, inherited.get("PYTHONPATH"))))
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tuneloop.rollout.vllm_worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**inherited, **environment},
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a terminal's Ctrl-C is for the trainer, which saves first
            )
        theirs.close()
        self._connection: Connection = ours
        try:
            self.ask("start", **options)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def ask(self, call: str, **arguments: Any) -> Any:
        """One request and its answer.

        Raises:
            UserError: the request cannot be served, and never will be.
            EngineDied: the process ended, took too long, or failed.
        """
        try:
            self._connection.send_bytes(json.dumps({"call": call, **arguments}).encode())
            if not self._connection.poll(self._timeout):
                raise EngineDied(f"the vllm engine did not answer {call!r} in {self._timeout:.0f} s (log: {self.log})")
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            raise EngineDied(f"the vllm engine {self._how_it_ended()} in {call!r} (log: {self.log})") from None
        if "refused" in answer:
            raise UserError(answer["refused"])
        if "failed" in answer:
            raise EngineDied(f"the vllm engine failed in {call!r}: {answer['failed']} (log: {self.log})")
        return answer["value"]

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "stopped talking"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        """End it and whatever it started, and remove what they leave behind in /dev/shm."""
        group = self._process.pid  # it leads a session of its own
        shared = _shared_memory(group)
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        deadline = time.monotonic() + _LONGEST_END
        while _members(group) and time.monotonic() < deadline:  # whoever starts next needs their memory
            time.sleep(0.02)
        for path in shared:
            path.unlink(missing_ok=True)


def _members(group: int) -> list[Path]:
    """The living processes of a group, as folders of /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(folder)
    return found


def _shared_memory(group: int) -> set[Path]:
    """What a group's processes share by Python's shared memory, whose own clean-up dies with them."""
    found = set()
    for folder in _members(group):
        with suppress(OSError):
            mapped = {line.split()[-1] for line in (folder / "maps").read_text().splitlines()}
            found |= {Path(name) for name in mapped if name.startswith("/dev/shm/psm_")}
    return found
