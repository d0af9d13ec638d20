"""The whole DAG with its real steps: interrupted in training, resumed to a promotion, then refused by the gate."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_run import tiny_toml

REPOSITORY = Path(__file__).resolve().parents[2]
# What the tiny model can learn from scratch in a few updates: to say 7 whatever it is asked.
ROWS = "".join(json.dumps({"prompt": f"What follows {n}?", "answer": "7"}) + "\n" for n in range(200))
SETTINGS = (
    'data_prep.sources=[{kind="jsonl", uri="rows.jsonl"}]',
    "data_prep.test_share=0.15",
    "sft_warmup.updates=20",
    "sft_warmup.optimizer.learning_rate=0.01",
    "sft_warmup.optimizer.warmup_updates=1",
    "lora_rl.updates=8",
    "lora_rl.checkpoint_every=1",
    "task.max_new_tokens=2",
)


def pipelines(folder: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def updates(metrics: Path) -> list[int]:
    return [json.loads(line)["update"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The three commands of a user: (exit code, stdout, stderr) of each, and what was seen in between."""
    folder = tmp_path_factory.mktemp("story")
    (folder / "rows.jsonl").write_text(ROWS)
    run = folder / "runs" / "x"
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    first = pipelines(folder, "run", "--config", str(tiny_toml(folder)), "--run", "x", *sets)
    checkpoints = run / "lora_rl.partial" / "checkpoints"
    deadline = time.monotonic() + 300
    while first.poll() is None and time.monotonic() < deadline and not list(checkpoints.glob("update-*/COMMITTED")):
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGINT)
    ended = [(*first.communicate(timeout=200), first.returncode)]
    seen = {"done": max(updates(run / "lora_rl.partial" / "metrics.jsonl"))}
    seen["steps"] = {name: (run / name / "step.json").read_bytes() for name in ("check", "data_prep", "sft_warmup")}
    for arguments in (["--resume", "runs/x"], ["--resume", "x", "--from", "evaluate"]):
        process = pipelines(folder, "run", *arguments)
        ended.append((*process.communicate(timeout=300), process.returncode))
        seen.setdefault("report", json.loads((run / "report.json").read_text()))
    return folder, run, ended, seen


def test_ctrl_c_in_training_saves_and_says_how_to_go_on(story):
    _, _, [(out, err, code), *_], seen = story
    assert code == 75, (out, err)
    assert err.count("\n") == 1
    assert "python -m pipelines run --resume runs/x" in err
    assert 1 <= seen["done"] < 8


def test_resumed_run_repeats_nothing_and_promotes(story):
    folder, run, [_, (out, err, code), _], seen = story
    assert (code, err) == (0, ""), out
    for name, record in seen["steps"].items():
        assert (run / name / "step.json").read_bytes() == record
        assert f"{name} | already done" in out
    assert [update for update in updates(run / "lora_rl" / "metrics.jsonl") if update] == list(range(1, 9))
    assert "gate: passed" in out
    assert "adapter version 1 is now production" in out
    assert seen["report"]["status"] == "promoted"
    assert seen["report"]["accuracy"]["candidate"]["value"] > seen["report"]["accuracy"]["base"]["value"]
    assert (folder / "registry" / "adapter" / "versions" / "1").is_dir()


def test_same_adapter_again_is_refused_by_the_gate(story):
    folder, run, [*_, (out, err, code)], _ = story
    assert (code, err) == (3, ""), out
    assert "removed runs/x/evaluate" in out
    assert "removed runs/x/promote" in out
    assert "gate: not passed" in out
    assert not (run / "promote").exists()
    assert json.loads((run / "report.json").read_text())["status"] == "kept"
    assert [path.name for path in (folder / "registry" / "adapter" / "versions").iterdir() if path.is_dir()] == ["1"]
