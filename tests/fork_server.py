"""A process that has imported, prepared and loaded everything, and forks trainings that begin at once.

    python -m tests.fork_server FOLDER CONFIG OVERRIDE...

It runs data_prep and sft_warmup into FOLDER, then reads JSON objects, one a line. `{"step": "lora_rl", "output":
"<name>", "overrides": [...], "slow": ["<phase>", <entry>]}` forks a process that runs the step into FOLDER/<name>, and
is answered with its process id; the next line, of any content, with its exit status, as `os.waitpid` gives it. What a
training does at an instant is in FOLDER/mark: how often it has entered each phase, and the running phase's place in
`PHASES`. The named entry into a phase, if any, takes `SLOW_SECONDS` longer.
"""

import functools
import json
import mmap
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = ("start", "rollout", "score", "update", "sync", "save", "validate", "between")
SLOW_SECONDS = 30.0
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
    """Prepare, then serve until stdin ends."""
    import torch

    import tuneloop.models.load as loading
    from components.config import load_run_config
    from components.data_prep.step import STEP as DATA_PREP
    from components.lora_rl.step import STEP as LORA_RL
    from components.runner import execute
    from components.sft_warmup.step import STEP as SFT_WARMUP
    from tuneloop.models.sources import resolve_model

    torch.set_num_threads(1)
    folder, config, overrides = Path(sys.argv[1]), sys.argv[2], tuple(sys.argv[3:])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    settings = load_run_config(config, overrides)
    inputs = {"data": str(folder / "data"), "warmup": str(folder / "warmup")}

    def prepare() -> None:
        execute(DATA_PREP, settings, {}, inputs["data"])
        execute(SFT_WARMUP, settings, {"data": inputs["data"]}, inputs["warmup"])

    def train(order: dict[str, Any]) -> None:
        slow = tuple(order["slow"]) if order["slow"] else None
        mark = Mark(folder, slow)
        mark_phases(mark, folder / f"{order['output']}.phases")
        mark.enter("start")
        config_of_run = load_run_config(config, (*overrides, *order["overrides"]))
        step = {"lora_rl": LORA_RL, "sft_warmup": SFT_WARMUP}[order["step"]]
        execute(step, config_of_run, {name: inputs[name] for name in step.inputs}, str(folder / order["output"]))

    model = loading.load_model(resolve_model(settings.model.uri), settings.model.dtype)
    loading.load_model = lambda *_: model  # the children's own copy, since they are forked
    # Backward passes are for children only: torch's threads do not survive a fork.
    os.waitpid(forked(prepare), 0)
    while line := sys.stdin.readline():
        child = forked(functools.partial(train, json.loads(line)))
        print(child, file=answers, flush=True)
        sys.stdin.readline()  # until then the child's process id is its own, dead or alive
        print(os.waitpid(child, 0)[1], file=answers, flush=True)


def forked(action: Callable[[], object]) -> int:
    """Do it in a child that ends with a step's exit code; returns the child's process id."""
    from components.runner import exit_code_of

    child = os.fork()
    if child == 0:
        os.dup2(1, 2)
        code = exit_code_of(action)
        sys.stdout.flush()
        os._exit(code)
    return child


if __name__ == "__main__":
    main()
