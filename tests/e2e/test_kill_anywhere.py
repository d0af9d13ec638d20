"""SIGKILL at 25 random instants of a training, and SIGTERM with a grace: no end of a process changes what is trained.

A server process forks trainings that begin at once, so that a kill costs a second. `SEED` in the environment repeats
one choice of instants.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fork_server import SLOW_SECONDS, Mark
from tuneloop.models.adapter_io import load_adapter

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "ci.toml"
KILLS, UPDATES = 25, 6
KILLED_IN = ("rollout", "update", "sync", "save")
OVERRIDES = (
    f"lora_rl.updates={UPDATES}", "lora_rl.prompts_per_update=16", "lora_rl.group_size=4",
    "lora_rl.validation_prompts=8", "lora_rl.validate_every=2", "sft_warmup.updates=4",
)  # fmt: skip
CLOCK_AND_MEMORY = ("time", "seconds/", "tokens_per_second/", "memory/")  # columns that differ from run to run


def numbers(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without what the machine decides."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if not name.startswith(CLOCK_AND_MEMORY)} for row in rows]


class Server:
    """Starts trainings into a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        command = [sys.executable, "-m", "tests.fork_server", str(folder), str(CONFIG), *OVERRIDES]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin
        assert self.process.stdout
        self._orders, self._answers = self.process.stdin, self.process.stdout
        self.mark: Mark

    def start(self, output: str, *overrides: str, step: str = "lora_rl", slow: tuple[str, int] | None = None) -> int:
        """Begin a training; returns its process id. The `slow` entry into a phase takes longer than any test waits."""
        (self.folder / "mark").unlink(missing_ok=True)
        self.mark = Mark(self.folder)
        self._order({"step": step, "output": output, "overrides": overrides, "slow": slow})
        return int(self._answers.readline())

    def wait(self) -> int:
        """The exit status: negative when a signal ended it."""
        self._order("wait")
        return os.waitstatus_to_exitcode(int(self._answers.readline()))

    def wait_for(self, phase: str, entry: int) -> None:
        """Until the training enters the phase for that time."""
        deadline = time.monotonic() + 60
        while self.mark.entered(phase) < entry:
            time.sleep(0.0002)
            assert time.monotonic() < deadline, f"phase {phase} was not entered {entry} times"

    def _order(self, order: object) -> None:
        self._orders.write(json.dumps(order) + "\n")
        self._orders.flush()

    def train(self, output: str, *overrides: str, step: str = "lora_rl") -> Path:
        """A whole training."""
        self.start(output, *overrides, step=step)
        assert self.wait() == 0, (self.folder / "log").read_text()[-3000:]
        return self.folder / output


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("killed"))
    yield server
    server.process.communicate()


@dataclass(frozen=True)
class Whole:
    """The uninterrupted training, and (phase, seconds) of the phases that it went through."""

    folder: Path
    phases: list[tuple[str, float]]


@pytest.fixture(scope="module")
def whole(server: Server) -> Whole:
    folder = server.train("whole")
    lines = (server.folder / "whole.phases").read_text().splitlines()
    return Whole(folder, [tuple(json.loads(line)) for line in lines])


def kill_in(server: Server, whole: Whole, phase: str, chance: random.Random, process: int) -> str:
    """SIGKILL a training at a random instant of a random entry into `phase`; returns the phase that was hit."""
    durations = [seconds for name, seconds in whole.phases if name == phase]
    server.wait_for(phase, chance.randint(1, UPDATES // 2 if phase == "save" else len(durations)))
    time.sleep(chance.random() * statistics.median(durations))
    os.kill(process, signal.SIGKILL)
    return server.mark.running() if server.wait() == -signal.SIGKILL else "ended"


def assert_same(resumed: Path, whole: Path) -> None:
    for name in ("rl.json", "samples.jsonl", "adapter/adapter_model.safetensors"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes(), name
    assert load_adapter(resumed / "adapter").digest() == load_adapter(whole / "adapter").digest()
    assert [row["update"] for row in numbers(resumed)] == list(range(UPDATES + 1))
    assert numbers(resumed) == numbers(whole)


def test_killed_at_any_instant_ends_with_the_same_adapter(server: Server, whole: Whole):
    seed = int(os.environ.get("SEED", random.randrange(10**6)))
    print("SEED =", seed)
    chance = random.Random(seed)
    hits: Counter[str] = Counter()
    while hits.total() - hits["ended"] < KILLS or min(hits[phase] for phase in KILLED_IN) < 3:
        number = hits.total()
        assert number < 3 * KILLS, f"no phase was hit often enough: {hits}"
        phase = min(KILLED_IN, key=lambda phase: hits[phase])
        output, every = f"killed-{number}", f"lora_rl.checkpoint_every={1 + number % 2}"
        hits[kill_in(server, whole, phase, chance, server.start(output, every))] += 1
        assert_same(server.train(output, every), whole.folder)
    print(dict(hits))


# A request to stop


def stopped(server: Server, phase: str, entry: int, output: str, *overrides: str, step: str = "lora_rl") -> int | None:
    """SIGTERM a training in an entry into a phase that does not end; returns the update of its newest checkpoint."""
    process = server.start(output, *overrides, step=step, slow=(phase, entry))
    server.wait_for(phase, entry)
    asked = time.monotonic()
    os.kill(process, signal.SIGTERM)
    assert server.wait() == 75, (server.folder / "log").read_text()[-3000:]
    assert time.monotonic() - asked < SLOW_SECONDS / 2
    assert not (server.folder / output).exists()
    saved = sorted((server.folder / f"{output}.partial" / "checkpoints").glob("update-*/COMMITTED"))
    return json.loads(saved[-1].read_text())["update"] if saved else None


SELDOM = "lora_rl.checkpoint_every=100"  # no checkpoint but that of the request


@pytest.mark.parametrize(
    ("phase", "entry", "saved"),
    [
        ("rollout", 1, None),  # the validation before the first update
        ("rollout", 2, 0),
        ("rollout", 4, 1),  # the validation after update 2, which is not finished before
        ("update", 3, 2),
        ("sync", 1, None),
        ("sync", 4, 2),  # behind the optimiser steps of update 3
    ],
)
def test_update_that_outlasts_the_grace_is_abandoned(server: Server, whole: Whole, phase, entry, saved):
    overrides = SELDOM, "lora_rl.stop_grace_seconds=0.2"
    output = f"abandoned-{phase}-{entry}"
    assert stopped(server, phase, entry, output, *overrides) == saved
    assert_same(server.train(output, *overrides), whole.folder)


def test_update_that_ends_within_the_grace_is_saved(server: Server, whole: Whole):
    output, overrides = "in-time", (SELDOM, "lora_rl.stop_grace_seconds=60.0")
    process = server.start(output, *overrides)
    server.wait_for("update", 3)
    os.kill(process, signal.SIGTERM)
    assert server.wait() == 75
    assert (server.folder / f"{output}.partial" / "checkpoints" / "update-000003").is_dir()
    assert "stopped after update 3, which is saved; run again to continue" in (server.folder / "log").read_text()
    assert_same(server.train(output, *overrides), whole.folder)


def test_stopped_without_any_grace_at_random_instants(server: Server, whole: Whole):
    """Up to the last instant before the output is complete: what is being written then is written to the end."""
    chance = random.Random(os.environ.get("SEED"))
    overrides = "lora_rl.checkpoint_every=2", "lora_rl.stop_grace_seconds=0.0"
    seconds = sum(seconds for _, seconds in whole.phases)
    for number in range(6):
        process = server.start(f"stopped-{number}", *overrides)
        server.wait_for("start", 1)
        time.sleep(seconds * chance.random())
        os.kill(process, signal.SIGTERM)
        assert server.wait() in (0, 75)
        assert_same(server.train(f"stopped-{number}", *overrides), whole.folder)


@pytest.mark.parametrize(("mode", "saved"), [("lora", 1), ("full", None)])
def test_warm_up_that_outlasts_the_grace_is_abandoned(server: Server, mode: str, saved: int | None):
    """After a full update there is no copy of what was before it: without a checkpoint, it begins anew."""
    overrides = (
        f'sft_warmup.mode="{mode}"', "sft_warmup.stop_grace_seconds=0.2", "sft_warmup.validate_every=2",
        "sft_warmup.checkpoint_every=100",
    )  # fmt: skip
    uninterrupted = server.train(f"{mode}-whole", *overrides, step="sft_warmup")
    output = f"{mode}-stopped"
    assert stopped(server, "validate", 2, output, *overrides, step="sft_warmup") == saved
    resumed = server.train(output, *overrides, step="sft_warmup")
    assert (resumed / "warmup.json").read_text() == (uninterrupted / "warmup.json").read_text()
    assert numbers(resumed) == numbers(uninterrupted)
