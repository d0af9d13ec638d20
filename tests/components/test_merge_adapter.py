"""The merge_adapter step: the merged model is proven on held-out prompts, or nothing is published."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from components.config import RunConfig, load_run_config
from components.data_prep.step import STEP as DATA_PREP
from components.merge_adapter.step import STEP
from components.runner import execute
from components.step_command import main
from tuneloop.errors import UserError
from tuneloop.models.adapter_io import Adapter, save_adapter
from tuneloop.models.merge import merge_adapter
from tuneloop.models.merge_probe import ProbeResult, _Divergence, probe_merge, require_close
from tuneloop.models.sources import resolve_model

BASE = "tiny://qwen2?seed=0&dtype=bfloat16"
TOML = """
name = "merge"
[model]
uri = "tiny://qwen2?seed=0&dtype=bfloat16"
max_length = 96
[task]
max_new_tokens = 4
[lora]
rank = 4
[data_prep]
max_prompt_tokens = 80
max_completion_tokens = 8
near_duplicates.enabled = false
validation_share = 0.4
[[data_prep.sources]]
kind = "jsonl"
uri = "ROWS"
"""
LEAVES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    rows = [{"prompt": f"What is {number} plus 1?", "answer": str(number + 1)} for number in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(TOML.replace("ROWS", str(folder / "rows.jsonl")))
    return folder / "run.toml"


@pytest.fixture(scope="module")
def config(config_file: Path) -> RunConfig:
    return load_run_config(config_file)


@pytest.fixture(scope="module")
def inputs(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Prepared data, and a training output with an adapter that changes what the model says."""
    folder = tmp_path_factory.mktemp("inputs")
    execute(DATA_PREP, config, {}, str(folder / "data"))
    make_training(folder / "training", scale=0.2)
    return {"data": str(folder / "data"), "training": str(folder / "training")}


def make_training(folder: Path, scale: float, base_uri: str = BASE) -> Path:
    generator = torch.Generator().manual_seed(7)
    weights = load_file(resolve_model(base_uri) / "model.safetensors")
    factors = {
        name.removesuffix(".weight"): (
            torch.randn(4, tensor.shape[1], generator=generator) * scale,
            torch.randn(tensor.shape[0], 4, generator=generator) * scale,
        )
        for name, tensor in weights.items()
        if name.split(".")[-2] in LEAVES and name.endswith(".weight")
    }
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "target_modules": list(LEAVES)}
    adapter = Adapter(factors, settings)
    save_adapter(adapter, folder / "adapter")
    record = {"updates": 3, "adapter_digest": adapter.digest(), "base_uri": base_uri,
              "validation_accuracy": {"first": 0.25, "last": 0.5}}  # fmt: skip
    (folder / "rl.json").write_text(json.dumps(record))
    return folder


def read_merge(output: Path) -> dict[str, Any]:
    return json.loads((output / "merge.json").read_text())


def with_settings(config_file: Path, *overrides: str) -> RunConfig:
    return load_run_config(config_file, overrides)


def test_the_merged_model_is_published_with_its_proof(config, inputs, tmp_path):
    output = tmp_path / "merge_adapter"
    summary = execute(STEP, config, inputs, str(output)).summary
    record = read_merge(output)
    assert record["base_uri"] == BASE
    assert record["adapter_digest"] == json.loads((Path(inputs["training"]) / "rl.json").read_text())["adapter_digest"]
    assert (record["dtype"], record["shards"], record["merged_modules"]) == ("bfloat16", 1, 14)
    weights = load_file(output / "model" / "model.safetensors")
    assert record["bytes"] == summary["bytes"] == sum(tensor.nbytes for tensor in weights.values())
    probe = record["probe"]
    assert probe["prompts"] == 8
    assert probe["tokens"] > 8 * 20
    assert 0 < probe["mean_kl"] < probe["tolerance"] < probe["adapter_kl"]
    assert probe["top1_agreement"] > 0.9
    assert summary["mean_kl"] == probe["mean_kl"]
    card = (output / "model" / "README.md").read_text()
    for fact in (BASE, record["adapter_digest"], "validation accuracy after RL | 0.5"):
        assert fact in card


def test_fp32_merge_is_equal_but_for_the_last_bits(config_file, inputs, tmp_path):
    config = with_settings(config_file, "merge_adapter.dtype=float32", "merge_adapter.max_shard_bytes=1_000_000")
    execute(STEP, config, inputs, str(tmp_path / "out"))
    probe = read_merge(tmp_path / "out")["probe"]
    assert probe["mean_kl"] < 1e-9
    assert probe["max_logprob_difference"] < 1e-3
    assert probe["top1_agreement"] == 1.0


def test_beyond_the_tolerance_nothing_is_published(config_file, inputs, tmp_path):
    config = with_settings(config_file, "merge_adapter.tolerance=1e-9")
    with pytest.raises(UserError, match=r"merged model differs from base \+ adapter .*tolerance 1e-09"):
        execute(STEP, config, inputs, str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_after_a_full_warm_up_the_adapter_is_merged_into_the_warmed_up_model(config_file, inputs, tmp_path):
    warmed = resolve_model("tiny://qwen2?seed=1&dtype=bfloat16")
    (tmp_path / "warmup").mkdir()
    shutil.copytree(warmed, tmp_path / "warmup" / "model")
    config = with_settings(config_file, "sft_warmup.mode=full")
    execute(STEP, config, {**inputs, "warmup": str(tmp_path / "warmup")}, str(tmp_path / "out"))
    embedding = "model.embed_tokens.weight"
    merged = load_file(tmp_path / "out" / "model" / "model.safetensors")[embedding]
    assert torch.equal(merged, load_file(warmed / "model.safetensors")[embedding])
    assert not torch.equal(merged, load_file(resolve_model(BASE) / "model.safetensors")[embedding])
    with pytest.raises(UserError, match=r"give that step's output as --warmup"):
        execute(STEP, config, inputs, str(tmp_path / "other"))


def test_inputs_that_do_not_belong_together_are_refused(config_file, config, inputs, tmp_path):
    training = Path(shutil.copytree(inputs["training"], tmp_path / "training"))
    record = json.loads((training / "rl.json").read_text())
    (training / "rl.json").write_text(json.dumps({**record, "adapter_digest": "0" * 64}))
    with pytest.raises(UserError, match=r"not the adapter that rl\.json names"):
        execute(STEP, config, {**inputs, "training": str(training)}, str(tmp_path / "out"))
    (training / "rl.json").unlink()
    with pytest.raises(UserError, match=r"rl\.json: missing or damaged; name the output of a finished lora_rl step"):
        execute(STEP, config, {**inputs, "training": str(training)}, str(tmp_path / "out"))
    data = Path(shutil.copytree(inputs["data"], tmp_path / "data"))
    card = json.loads((data / "data_card.json").read_text())
    (data / "data_card.json").write_text(json.dumps({**card, "splits": {"train": 9, "validation": 0, "test": 0}}))
    with pytest.raises(UserError, match="no held-out rows to prove the merge on"):
        execute(STEP, config, {**inputs, "data": str(data)}, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command_line_ends_with_2_and_one_line(config_file, inputs, tmp_path, capfd):
    training = make_training(tmp_path / "training", scale=0.0)
    arguments = ["--config", str(config_file), "--data", inputs["data"], "--training", str(training)]
    assert main(STEP, [*arguments, "--output", str(tmp_path / "out")]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert "the adapter changes nothing" in lines[-1]
    assert not any("Traceback" in line for line in lines)


def probe_of(inputs: Mapping[str, str], merged: Path) -> ProbeResult:
    sequences = [list(range(3, 90)), list(range(90, 250))]  # the second is longer than two pieces
    return probe_merge(resolve_model(BASE), Path(inputs["training"]) / "adapter", merged, sequences)


def test_a_merge_that_did_not_merge_is_refused(inputs, tmp_path):
    probe = probe_of(inputs, Path(shutil.copytree(resolve_model(BASE), tmp_path / "merged")))
    assert probe.mean_kl == pytest.approx(probe.adapter_kl, rel=1e-6)
    assert probe.tokens == 86 + 159
    with pytest.raises(UserError, match="differs from base"):
        require_close(probe, 1e-3)
    with pytest.raises(UserError, match=r"no nearer to base \+ adapter .* than the bare base"):
        require_close(probe, 100.0)


def test_a_merge_with_the_wrong_scaling_is_refused(inputs, tmp_path):
    halved = Path(shutil.copytree(Path(inputs["training"]) / "adapter", tmp_path / "halved"))
    settings = json.loads((halved / "adapter_config.json").read_text())
    (halved / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 2}))
    merge_adapter(resolve_model(BASE), halved, tmp_path / "merged", dtype="float32")
    with pytest.raises(UserError, match="differs from base"):
        require_close(probe_of(inputs, tmp_path / "merged"), 1e-2)


def test_divergence_by_hand():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL = 3/4 ln(3/2) + 1/4 ln(1/2); token 1 came: |ln(1/4) - ln(1/2)|."""
    divergence = _Divergence()
    p_TV, q_TV = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    divergence.add(p_TV, q_TV, torch.tensor([1]))
    assert divergence.kl == pytest.approx(0.75 * 0.4054651 - 0.25 * 0.6931472, abs=1e-6)
    assert divergence.max_difference == pytest.approx(0.6931472, abs=1e-6)
    divergence.add(p_TV, torch.tensor([[0.25, 0.75]]).log(), torch.tensor([0]))
    assert (divergence.agreeing, divergence.tokens) == (1, 2)


def test_a_merged_model_that_is_not_a_number_is_refused():
    nan = ProbeResult(1, 1, float("nan"), 0.0, 1.0, 1.0)
    with pytest.raises(UserError, match="differs from base"):
        require_close(nan, 1e9)
