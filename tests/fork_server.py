"""A process that has imported and loaded everything, and forks steps that begin at once.

    python -m tests.fork_server FOLDER CONFIG

It reads JSON objects, one a line. `{"step": "lora_rl", "parts": [{"overrides": [...], "inputs": {"data": "<name>", …},
"output": "<name>"}], "slow": ["<phase>", <entry>]}` forks a process that runs the step with CONFIG and these overrides
into FOLDER/<name>, or, with several parts, their lora_rl together. It is answered with the process id; the next line,
whatever it is, with the exit status, as `os.waitpid` gives it. What a training does at an instant is in FOLDER/mark:
how often it has entered each phase, and the running phase's place in `PHASES`. FOLDER/phases gets a line for each phase
that it leaves. The named entry into a phase, if any, takes `SLOW_SECONDS` longer.
"""

import functools
import json
import mmap
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PHASES = ("start", "rollout", "score", "update", "sync", "save", "validate", "between")
SLOW_SECONDS = 30.0
REPOSITORY = Path(__file__).resolve().parents[1]
MARK = struct.Struct(f"{len(PHASES) + 1}q")


class Mark:
    """Where a training is, in memory that another process can read while it runs, and after it was killed."""

    def __init__(self, folder: Path, slow: tuple[str, int] | None = None):
        self._slow = slow
        path = folder / "mark"
        if not path.exists():
            path.write_bytes(bytes(MARK.size))
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), MARK.size)

    def entered(self, phase: str) -> int:
        """How often the training has entered the phase."""
        return MARK.unpack_from(self._memory)[PHASES.index(phase)]

    def running(self) -> str:
        """The phase that it is in."""
        return PHASES[MARK.unpack_from(self._memory)[-1]]

    def enter(self, phase: str) -> None:
        """The training is in `phase` now."""
        *entered, _ = MARK.unpack_from(self._memory)
        number = PHASES.index(phase)
        entered[number] += 1
        MARK.pack_into(self._memory, 0, *entered, number)

    def around(self, phase: str, function: Callable[..., Any], log: Path) -> Callable[..., Any]:
        """`function`, marked as `phase` while it runs; how long it took goes to `log`."""

        @functools.wraps(function)
        def marked(*arguments: Any, **named: Any) -> Any:
            self.enter(phase)
            started = time.perf_counter()
            try:
                if (phase, self.entered(phase)) == self._slow:
                    time.sleep(SLOW_SECONDS)
                return function(*arguments, **named)
            finally:
                with open(log, "a") as file:
                    file.write(json.dumps([phase, time.perf_counter() - started]) + "\n")
                self.enter("between")

        return marked


def mark_phases(mark: Mark, log: Path) -> None:
    """Mark the phases of every training of this process."""
    from tuneloop.rollout.weight_sync import WeightSync
    from tuneloop.training import rl, sft
    from tuneloop.training.learner import Learner
    from tuneloop.training.run_state import RunState

    rl.collect = mark.around("rollout", rl.collect, log)
    sft._update = mark.around("update", sft._update, log)
    sft.validation_loss = mark.around("validate", sft.validation_loss, log)
    for owner, name, phase in (
        (Learner, "score", "score"),
        (Learner, "update", "update"),
        (WeightSync, "__call__", "sync"),
        (RunState, "save", "save"),
    ):
        setattr(owner, name, mark.around(phase, getattr(owner, name), log))


def main() -> None:
    """Load, then serve until stdin ends."""
    import torch

    import components.data_prep.step
    import components.lora_rl.step
    import components.lora_rl.training
    import components.sft_warmup.step
    import tuneloop.models.load as loading
    from components.config import load_run_config
    from components.lora_rl.joint import Part, execute_together
    from components.runner import execute
    from tuneloop.models.sources import resolve_model

    torch.set_num_threads(1)
    folder, config = Path(sys.argv[1]), sys.argv[2]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    settings = load_run_config(config)
    model = loading.load_model(resolve_model(settings.model.uri), settings.model.dtype)
    # The children's own copy, since they are forked. Backward passes are theirs: torch's threads do not survive a fork.
    loading.load_model = components.lora_rl.training.load_model = lambda *_: model

    def run(order: dict[str, Any]) -> None:
        mark = Mark(folder, tuple(order["slow"]) if order["slow"] else None)
        mark_phases(mark, folder / "phases")
        mark.enter("start")
        parts = []
        for part in order["parts"]:
            inputs = {name: str(folder / made) for name, made in part["inputs"].items()}
            parts.append(Part(load_run_config(config, tuple(part["overrides"])), inputs, str(folder / part["output"])))
        if len(parts) > 1:
            execute_together(parts)
        else:
            execute(
                sys.modules[f"components.{order['step']}.step"].STEP, parts[0].config, parts[0].inputs, parts[0].output
            )

    while line := sys.stdin.readline():
        child = forked(functools.partial(run, json.loads(line)))
        print(child, file=answers, flush=True)
        sys.stdin.readline()  # until then the child's process id is its own, dead or alive
        print(os.waitpid(child, 0)[1], file=answers, flush=True)


def forked(action: Callable[[], object]) -> int:
    """Do it in a child that ends with a step's exit code; returns the child's process id."""
    from components.exit_codes import exit_code_of

    child = os.fork()
    if child == 0:
        os.dup2(1, 2)
        code = exit_code_of(action)
        sys.stdout.flush()
        os._exit(code)
    return child


@dataclass(frozen=True)
class Run:
    """A step to run: its overrides, the names of its inputs, the name of its output."""

    output: str
    overrides: tuple[str, ...]
    inputs: dict[str, str] = field(default_factory=dict)

    def into(self, output: str, *overrides: str) -> "Run":
        """The same with another output and further overrides."""
        return Run(output, (*self.overrides, *overrides), self.inputs)


class Server:
    """The process, as a test sees it."""

    def __init__(self, folder: Path, config: Path):
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), str(config)],
            cwd=REPOSITORY, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.mark: Mark

    def start(self, *parts: Run, step: str = "lora_rl", slow: tuple[str, int] | None = None) -> int:
        """Begin a step; returns its process id. The `slow` entry into a phase takes longer than any test waits."""
        for name in ("mark", "phases"):
            (self.folder / name).unlink(missing_ok=True)
        self.mark = Mark(self.folder)
        return int(self._ask({"step": step, "parts": [asdict(part) for part in parts], "slow": slow}))

    def wait(self) -> int:
        """The exit status: negative when a signal ended it."""
        return os.waitstatus_to_exitcode(int(self._ask("wait")))

    def wait_for(self, phase: str, entry: int) -> None:
        """Until the step enters the phase for that time."""
        deadline = time.monotonic() + 60
        while self.mark.entered(phase) < entry:
            time.sleep(0.0002)
            assert time.monotonic() < deadline, f"phase {phase} was not entered {entry} times; {self.log()}"

    def run(self, *parts: Run, step: str = "lora_rl") -> list[Path]:
        """A whole step; returns the outputs."""
        self.start(*parts, step=step)
        assert self.wait() == 0, self.log()
        return [self.folder / part.output for part in parts]

    def log(self) -> str:
        """The end of what the steps printed."""
        return (self.folder / "log").read_text()[-3000:]

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def _ask(self, order: object) -> str:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


if __name__ == "__main__":
    main()
