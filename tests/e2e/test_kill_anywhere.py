"""SIGKILL at 25 random instants of a training, and SIGTERM with a grace: no end of a process changes what is trained.

A server process forks trainings that begin at once, so that a kill costs a second. `SEED` in the environment repeats
one choice of instants.
"""

import json
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fork_server import REPOSITORY, SLOW_SECONDS, Run, Server
from tuneloop.models.adapter_io import load_adapter

CONFIG = REPOSITORY / "configs" / "ci.toml"
KILLS, UPDATES = 25, 6
KILLED_IN = ("rollout", "update", "sync", "save")
# A reward that a random model sometimes earns, so that every update has something to learn from.
OVERRIDES = (
    'task.rewards=[{kind="exact"}, {kind="format", pattern="[0-9].*", weight=0.3}]',
    f"lora_rl.updates={UPDATES}", "lora_rl.prompts_per_update=8", "lora_rl.group_size=8",
    "lora_rl.validation_prompts=8", "lora_rl.validate_every=2", "sft_warmup.updates=4",
)  # fmt: skip
CLOCK_AND_MEMORY = ("time", "seconds/", "tokens_per_second/", "memory/")  # columns that differ from run to run


def numbers(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without what the machine decides."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if not name.startswith(CLOCK_AND_MEMORY)} for row in rows]


RL = Run("whole", OVERRIDES, {"data": "data", "warmup": "warmup"})
SFT = Run("warmup", OVERRIDES, {"data": "data"})


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("killed"), CONFIG)
    server.run(Run("data", OVERRIDES), step="data_prep")
    server.run(SFT, step="sft_warmup")
    yield server
    server.close()


@dataclass(frozen=True)
class Whole:
    """The uninterrupted training, and (phase, seconds) of the phases that it went through."""

    folder: Path
    phases: list[tuple[str, float]]


@pytest.fixture(scope="module")
def whole(server: Server) -> Whole:
    [folder] = server.run(RL)
    assert [row.get("update/steps") for row in numbers(folder)] == [None, *[2.0] * UPDATES]
    lines = (server.folder / "phases").read_text().splitlines()
    return Whole(folder, [tuple(json.loads(line)) for line in lines])


def kill_in(server: Server, whole: Whole, phase: str, chance: random.Random, process: int) -> str:
    """SIGKILL a training at a random instant of a random entry into `phase`; returns the phase that was hit."""
    durations = [seconds for name, seconds in whole.phases if name == phase]
    server.wait_for(phase, chance.randint(1, UPDATES // 2 if phase == "save" else len(durations)))
    time.sleep(chance.random() * statistics.median(durations))
    os.kill(process, signal.SIGKILL)
    return server.mark.running() if server.wait() == -signal.SIGKILL else "ended"


def assert_same(server: Server, run: Run, uninterrupted: Whole) -> None:
    """Continue the run, and hold what it leaves against the uninterrupted one's."""
    whole, [resumed] = uninterrupted.folder, server.run(run)
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
        run = RL.into(f"killed-{number}", f"lora_rl.checkpoint_every={1 + number % 2}")
        hits[kill_in(server, whole, phase, chance, server.start(run))] += 1
        assert_same(server, run, whole)
    print(dict(hits))


# A request to stop


def stopped(server: Server, phase: str, entry: int, run: Run, step: str = "lora_rl") -> int | None:
    """SIGTERM a training in an entry into a phase that does not end; returns the update of its newest checkpoint."""
    process = server.start(run, step=step, slow=(phase, entry))
    server.wait_for(phase, entry)
    asked = time.monotonic()
    os.kill(process, signal.SIGTERM)
    assert server.wait() == 75, server.log()
    assert time.monotonic() - asked < SLOW_SECONDS / 2
    assert not (server.folder / run.output).exists()
    saved = sorted((server.folder / f"{run.output}.partial" / "checkpoints").glob("update-*/COMMITTED"))
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
    run = RL.into(f"abandoned-{phase}-{entry}", SELDOM, "lora_rl.stop_grace_seconds=0.2")
    assert stopped(server, phase, entry, run) == saved
    assert_same(server, run, whole)


def test_update_that_ends_within_the_grace_is_saved(server: Server, whole: Whole):
    run = RL.into("in-time", SELDOM, "lora_rl.stop_grace_seconds=60.0")
    process = server.start(run)
    server.wait_for("update", 3)
    os.kill(process, signal.SIGTERM)
    assert server.wait() == 75
    assert (server.folder / "in-time.partial" / "checkpoints" / "update-000003").is_dir()
    assert "stopped after update 3, which is saved; run again to continue" in server.log()
    assert_same(server, run, whole)


def test_stopped_without_any_grace_at_random_instants(server: Server, whole: Whole):
    """Up to the last instant before the output is complete: what is being written then is written to the end."""
    chance = random.Random(os.environ.get("SEED"))
    seconds = sum(seconds for _, seconds in whole.phases)
    for number in range(6):
        run = RL.into(f"stopped-{number}", "lora_rl.checkpoint_every=2", "lora_rl.stop_grace_seconds=0.0")
        process = server.start(run)
        server.wait_for("start", 1)
        time.sleep(seconds * chance.random())
        os.kill(process, signal.SIGTERM)
        assert server.wait() in (0, 75)
        assert_same(server, run, whole)


@pytest.mark.parametrize(("mode", "saved"), [("lora", 1), ("full", None)])
def test_warm_up_that_outlasts_the_grace_is_abandoned(server: Server, mode: str, saved: int | None):
    """After a full update there is no copy of what was before it: without a checkpoint, it begins anew."""
    overrides = (
        f'sft_warmup.mode="{mode}"', "sft_warmup.stop_grace_seconds=0.2", "sft_warmup.validate_every=2",
        "sft_warmup.checkpoint_every=100",
    )  # fmt: skip
    uninterrupted, run = SFT.into(f"{mode}-whole", *overrides), SFT.into(f"{mode}-stopped", *overrides)
    assert stopped(server, "validate", 2, run, step="sft_warmup") == saved
    [whole, resumed] = [server.run(part, step="sft_warmup")[0] for part in (uninterrupted, run)]
    assert (resumed / "warmup.json").read_text() == (whole / "warmup.json").read_text()
    assert numbers(resumed) == numbers(whole)
