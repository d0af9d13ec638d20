"""Several adapters over one base: each is, bit for bit, the one that a run of its own makes, killed or not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cli import main
from tests.fork_server import REPOSITORY, Run, Server
from tests.tiny_run import tiny_toml
from tuneloop.models.adapter_io import load_adapter

CONFIG = REPOSITORY / "configs" / "ci.toml"
# Rewards that a random model sometimes earns, so that every update has something to learn from.
SMALL = (
    'task.rewards=[{kind="exact"}, {kind="format", pattern="[0-9].*", weight=0.3}]',
    "lora_rl.prompts_per_update=8", "lora_rl.validation_prompts=8", "lora_rl.validate_every=2", "sft_warmup.updates=3",
)  # fmt: skip
# They differ in everything that may differ: task and rewards, ranks and targets, algorithm, seed, length.
MEMBERS = {
    "wide": ("lora.rank=16", "lora_rl.updates=5"),
    "narrow": (
        "lora.rank=4", 'lora.target_modules="attention"', "lora_rl.updates=3", "lora_rl.group_size=4", "seed=5",
        "lora_rl.algorithm.kl_coefficient=0.05", "lora_rl.checkpoint_every=1",
    ),
    "other": (
        "lora.rank=8", "lora_rl.updates=4", "seed=6", 'lora_rl.algorithm.name="rloo"', "task.max_new_tokens=3",
        'task.rewards=[{kind="format", pattern=".{0,2}"}]', "lora_rl.checkpoint_every=2",
    ),
}  # fmt: skip
CLOCK_AND_MEMORY = ("time", "seconds/", "tokens_per_second/", "memory/")  # columns that differ from run to run


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """With the warm-ups of all members, and what each makes alone."""
    server = Server(tmp_path_factory.mktemp("joint"), CONFIG)
    for name, run in parts("alone", ()).items():
        server.run(Run(f"{name}-data", run.overrides), step="data_prep")
        server.run(Run(f"{name}-warmup", run.overrides, {"data": f"{name}-data"}), step="sft_warmup")
        [alone] = server.run(run)
        assert all(row["update/steps"] > 0 for row in metrics(alone)[1:])
    yield server
    server.close()


def parts(output: str, overrides: tuple[str, ...]) -> dict[str, Run]:
    """Every member's part of a training, by name."""
    return {
        name: Run(
            f"{name}-{output}",
            (*SMALL, *changes, *overrides, f"name={name}"),
            {"data": f"{name}-data", "warmup": f"{name}-warmup"},
        )
        for name, changes in MEMBERS.items()
    }


def metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without what the machine decides."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in row.items() if not name.startswith(CLOCK_AND_MEMORY)} for row in rows]


def assert_as_alone(server: Server, output: str) -> None:
    for name in MEMBERS:
        alone, joint = server.folder / f"{name}-alone", server.folder / f"{name}-{output}"
        assert {path.name for path in joint.iterdir()} == {path.name for path in alone.iterdir()}
        for file in ("rl.json", "samples.jsonl", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
            assert (joint / file).read_bytes() == (alone / file).read_bytes(), (name, file)
        assert metrics(joint) == metrics(alone)
        assert load_adapter(joint / "adapter").digest() == load_adapter(alone / "adapter").digest()
        steps = [json.loads((folder / "step.json").read_text()) for folder in (alone, joint)]
        assert steps[0]["fingerprint"] == steps[1]["fingerprint"]


def test_joint_training_leaves_what_each_run_leaves_alone(server: Server):
    server.run(*parts("joint", ()).values())
    assert_as_alone(server, "joint")
    digests = {load_adapter(server.folder / f"{name}-joint" / "adapter").digest() for name in MEMBERS}
    assert len(digests) == len(MEMBERS)


def test_finished_members_are_found_and_the_others_trained(server: Server):
    runs = parts("rest", ())
    server.run(runs["narrow"])
    started = (server.folder / "narrow-rest" / "step.json").stat().st_mtime_ns
    server.run(*runs.values())
    assert (server.folder / "narrow-rest" / "step.json").stat().st_mtime_ns == started
    assert_as_alone(server, "rest")


def test_killed_at_random_instants_and_continued_together(server: Server):
    chance = random.Random(os.environ.get("SEED"))
    run = parts("killed", ("lora_rl.keep_checkpoints=1",))
    for _ in range(3):
        process = server.start(*run.values())
        server.wait_for(chance.choice(("rollout", "update", "sync")), chance.randint(2, 5))
        time.sleep(0.05 * chance.random())
        os.kill(process, signal.SIGKILL)
        server.wait()
    server.run(*run.values())
    for name in MEMBERS:
        alone, killed = server.folder / f"{name}-alone", server.folder / f"{name}-killed"
        assert (killed / "rl.json").read_bytes() == (alone / "rl.json").read_bytes()
        assert metrics(killed) == metrics(alone)


@pytest.mark.parametrize(("grace", "abandoned"), [("60.0", False), ("0.2", True)])
def test_stopped_saves_every_member_and_each_goes_on_alone(server: Server, grace: str, abandoned: bool):
    output = f"stopped-{grace}"
    runs = parts(output, (f"lora_rl.stop_grace_seconds={grace}", "lora_rl.checkpoint_every=100"))
    # The second updates: "wide" has finished its own when that of "narrow" is slow.
    process = server.start(*runs.values(), slow=("update", 5) if abandoned else None)
    server.wait_for("update", 5)
    os.kill(process, signal.SIGTERM)
    assert server.wait() == 75
    saved = {}
    for name in MEMBERS:
        [mark] = (server.folder / f"{name}-{output}.partial" / "checkpoints").glob("*/COMMITTED")
        saved[name] = json.loads(mark.read_text())["update"]
    assert saved == {"wide": 2, "narrow": 1 if abandoned else 2, "other": 1}
    for run in runs.values():
        server.run(run)  # alone: what a joint training leaves is what a separate one continues
    for name in MEMBERS:
        alone, stopped = server.folder / f"{name}-alone", server.folder / f"{name}-{output}"
        assert load_adapter(stopped / "adapter").digest() == load_adapter(alone / "adapter").digest()
        assert metrics(stopped) == metrics(alone)


# The command line


def test_two_runs_of_one_base_are_stopped_continued_and_judged(tmp_path):
    toml = tiny_toml(tmp_path)
    files = []
    for name, rank in (("one", 4), ("two", 2)):
        text = toml.read_text().replace('name = "tiny"', f'name = "{name}"').replace("rank = 4", f"rank = {rank}")
        files.append(tmp_path / f"{name}.toml")
        files[-1].write_text(f'{text}\n[promote]\nadapter_name = "{name}"\nregistry = "{tmp_path / "registry"}"\n')
    runs = tmp_path / "runs"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "pipelines", "run", "--output", str(runs), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, text=True, **pipes)

    named = [part for file in files for part in ("--config", str(file), "--run", file.stem)]
    process = start(*named, "--set", "lora_rl.updates=40")
    log = runs / "two" / "lora_rl.partial" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate()
    assert process.returncode == 75, out + error
    again = f"continue with: python -m pipelines run --resume {runs / 'one'} --resume {runs / 'two'}\n"
    assert error == f"error: stopped; what the running step had saved is kept; {again}"
    process = start("--resume", "one", "--resume", "two")
    out, error = process.communicate()
    assert (process.returncode, error) == (3, ""), out + error  # 40 updates of a random model prove nothing
    assert out.count("continuing from the checkpoint of update") == 2
    for name in ("one", "two"):
        assert (runs / name / "report" / "report.html").exists()
        report = json.loads((runs / name / "report.json").read_text())
        assert (report["status"], report["run"]) == ("kept", name)
        assert f"report: {runs / name / 'report' / 'report.html'}" in out
        rows = [row["update"] for row in metrics(runs / name / "lora_rl")]
        assert rows == list(range(41))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ('[model]\nuri = "tiny://llama?seed=0"', "differ in model.uri (tiny://qwen2?seed=0 and tiny://llama?seed=0)"),
        ('[model]\ndtype = "bfloat16"', "differ in model.dtype (float32 and bfloat16)"),
        ('name = "tiny"', "two runs have the same name (tiny, tiny)"),
        ("[lora_rl.engine]\nmax_sequences = 7", "differ in lora_rl.engine.max_sequences (512 and 7)"),
        ('[lora_rl]\nmode = "full"', 'other: lora_rl.mode = "full" changes the base, which is shared'),
        ('[promote]\nadapter_name = "one"', "two runs promote to registry/one"),
    ],
)
def test_runs_that_cannot_share_a_base_are_refused_in_one_line(tmp_path, capsys, changes: str, line: str):
    first = tiny_toml(tmp_path)
    text = first.read_text()
    first.write_text(text + '\n[promote]\nadapter_name = "one"\n')
    table = tomllib.loads(text)
    for key, value in ({"name": "other", "promote": {"adapter_name": "two"}} | tomllib.loads(changes)).items():
        table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
    second = tmp_path / "second.json"
    second.write_text(json.dumps(table))
    arguments = ["run", "--config", str(first), "--config", str(second), "--output", str(tmp_path / "runs")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
