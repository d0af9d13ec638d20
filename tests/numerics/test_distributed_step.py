"""lora_rl in two processes, stopped and continued in one, stopped and continued in two: one process's adapter."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from components.data_prep.step import STEP as DATA_PREP
from components.lora_rl.step import STEP as LORA_RL
from components.runner import execute, step_fingerprint
from components.sft_warmup.step import STEP as SFT_WARMUP
from tests.tiny_run import tiny_config, tiny_toml
from tuneloop.errors import UserError
from tuneloop.models.adapter_io import load_adapter

pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'tuneloop[deepspeed]'")

UPDATES = 12
# Three groups a minibatch and one a pass: one of two processes has two passes, the other one and an empty one.
OVERRIDES = (
    f"lora_rl.updates={UPDATES}", "lora_rl.prompts_per_update=6", "lora_rl.group_size=4",
    "lora_rl.algorithm.minibatches=2", "lora_rl.algorithm.kl_coefficient=0.01", "lora_rl.micro_batch_tokens=60",
    "lora_rl.validate_every=6", 'task.rewards=[{kind="format", pattern="[^a-m]*"}]',
)  # fmt: skip
TWO = "lora_rl.distributed.processes=2"
SPREAD = (TWO, "lora_rl.distributed.zero_stage=3", "lora_rl.distributed.whole_below=0")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    paths = {"data": str(folder / "data_prep"), "warmup": str(folder / "sft_warmup")}
    execute(DATA_PREP, tiny_config(*OVERRIDES), {}, paths["data"])
    execute(SFT_WARMUP, tiny_config(*OVERRIDES), {"data": paths["data"]}, paths["warmup"])
    return paths


def start(folder: Path, inputs: dict[str, str], *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "components.lora_rl", "--config", str(tiny_toml(folder))]
    command += [part for name, path in inputs.items() for part in (f"--{name}", path)]
    command += [part for override in (*OVERRIDES, *overrides) for part in ("--set", override)]
    command += ["--output", str(folder / "lora_rl")]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stopped_after(folder: Path, inputs: dict[str, str], rows: int, *overrides: str) -> str:
    """Train until metrics.jsonl has so many rows, then SIGTERM; returns what stderr says."""
    process = start(folder, inputs, *overrides)
    metrics = folder / "lora_rl.partial" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < rows):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 75, error
    return error


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_any_number_of_processes_continues_to_the_same_adapter(inputs: dict[str, str], tmp_path: Path):
    alone = tmp_path / "alone"
    execute(LORA_RL, tiny_config(*OVERRIDES), inputs, str(alone))
    assert "stopped after update" in stopped_after(tmp_path, inputs, 3, *SPREAD)
    assert "stopped after update" in stopped_after(tmp_path, inputs, 6)
    process = start(tmp_path, inputs, TWO, "lora_rl.gradient_checkpointing=true")
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "continuing from the checkpoint of update" in output
    together = tmp_path / "lora_rl"
    expected, found = load_adapter(alone / "adapter"), load_adapter(together / "adapter")
    before = load_adapter(Path(inputs["warmup"]) / "adapter")
    moved = 0.0
    for name, factors in expected.factors.items():
        for mine, theirs, start_value in zip(found.factors[name], factors, before.factors[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
            moved = max(moved, float((theirs - start_value).abs().max()))
    assert moved > 5e-4
    ours, theirs = (rows(folder) for folder in (together, alone))
    assert [row["update"] for row in ours] == list(range(UPDATES + 1))
    for mine, reference in zip(ours, theirs, strict=True):
        for name in ("reward/mean", "validation/accuracy", "completion/tokens_mean"):
            assert mine.get(name) == reference.get(name)
        for name in ("loss/policy", "kl/reference", "entropy", "gradient/norm"):
            assert mine.get(name, 0.0) == pytest.approx(reference.get(name, 0.0), rel=1e-3, abs=1e-6)
    assert any(row.get("memory/sync_peak_bytes") for row in ours)
    assert json.loads((together / "step.json").read_text())["summary"]["processes"] == 2
    assert not (together / "checkpoints").exists()


def test_what_cannot_be_done_in_several_processes_is_refused(inputs: dict[str, str], tmp_path: Path):
    config = tiny_config(*OVERRIDES, TWO, 'lora_rl.rank_schedule.kind="spectrum"')
    with pytest.raises(UserError, match=r"rank_schedule .*processes = 1"):
        execute(LORA_RL, config, inputs, str(tmp_path / "ranks"))
    with pytest.raises(UserError, match="zero_stage 1 or 2"):
        tiny_config(*OVERRIDES, 'lora_rl.mode="full"', *SPREAD)
    with pytest.raises(UserError, match="offload_parameters needs zero_stage = 3"):
        tiny_config(*OVERRIDES, "lora_rl.distributed.offload_parameters=true")


def test_where_it_runs_does_not_change_what_a_run_is(inputs: dict[str, str]):
    paths = {name: Path(path) for name, path in inputs.items()}
    prints = {
        step_fingerprint(LORA_RL, tiny_config(*OVERRIDES, *more), paths)
        for more in ((), SPREAD, ("lora_rl.gradient_checkpointing=true",), ("lora_rl.updates=3",))
    }
    assert len(prints) == 2
