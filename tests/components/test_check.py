"""What the check step finds, against models that are real and damaged on purpose."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from components.check.consistency import check_consistency
from components.check.model import check_model
from components.check.plan import make_plan
from components.check.step import STEP
from components.runner import execute
from tests.tiny_run import tiny_config
from tuneloop.errors import UserError
from tuneloop.models.safetensors_header import read_header
from tuneloop.models.sources import resolve_model


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the tiny model that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("tiny://qwen2?seed=0"), folder)
    return folder


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_plan_counts_parameters_as_torch_does(tmp_path):
    from tuneloop.models.load import load_model
    from tuneloop.models.lora import attach, trainable_parameters

    config = tiny_config("lora.rank_pattern={down_proj=2}", "lora.exclude_modules=['q_proj']")
    plan = make_plan(config, check_model(config))
    loaded = load_model(resolve_model(config.model.uri), "float32", "cpu")
    assert plan["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
    layers = attach(loaded, config.lora, seed=0)
    assert plan["target_modules"] == len(layers)
    assert plan["adapter_parameters"] == sum(factor.numel() for _, factor in trainable_parameters(layers))


def test_plan_adds_up_by_hand():
    # 2 layers, hidden 64, intermediate 128, 4 heads of 16, 2 kv heads: q 64x64, k and v 32x64, o 64x64, gate and up
    # 128x64, down 64x128. Rank 4: 4 * (128 + 96 + 96 + 128 + 192 + 192 + 192) = 4096 a layer.
    plan = make_plan(tiny_config(), check_model(tiny_config()))
    assert plan["adapter_parameters"] == 8192
    memory = plan["memory_bytes"]
    assert memory["weights"] == 4 * plan["parameters"]
    assert (memory["adapter"], memory["gradients"], memory["optimizer"]) == (4 * 8192, 4 * 8192, 12 * 8192)
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")


def test_step_writes_the_plan_and_imports_no_torch(tmp_path):
    execute(STEP, tiny_config(), {}, str(tmp_path / "check"))
    plan = json.loads((tmp_path / "check" / "plan.json").read_text())
    assert plan["architecture"] == "Qwen2ForCausalLM"
    assert plan["unverified"] == []
    assert plan["free_disk_bytes"] > 0
    code = "import sys, components.check.step; sys.exit(bool({'torch', 'kfp', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_header_matches_the_library(model):
    from safetensors import safe_open

    header = read_header(model / "model.safetensors")
    with safe_open(model / "model.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a mapping
    assert {name: tensor.shape for name, tensor in header.items()} == shapes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-10], "cut off"),
        (lambda data: b"", "damaged"),
        (lambda data: b"\xff" * 64, "damaged"),
        (lambda data: struct.pack("<Q", 4) + b"[1]x", "damaged"),
        (lambda data: struct.pack("<Q", 12) + b'{"a": "b"}  ', "damaged"),
    ],
)
def test_damaged_weights(model, damage, message):
    weights = model / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(UserError, match=message):
        check_model(tiny_config(f"model.uri='{model}'"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"architectures": None}, "no architecture"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"max_position_embeddings": 64}, "model.max_length = 160 exceeds the 64 positions"),
    ],
)
def test_models_that_cannot_be_trained(model, changes, message):
    edit_json(model / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        check_model(tiny_config(f"model.uri='{model}'"))


def test_chat_template_may_lie_in_a_file_of_its_own(model):
    config = tiny_config(f"model.uri='{model}'")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no chat template"):
        check_model(config)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    check_model(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data_prep.max_completion_tokens=17", "SFT could not see"),
        ("lora_rl.micro_batch_tokens=159", "lora_rl.micro_batch_tokens = 159"),
        ("evaluate.gate.guards=[{metric='length'}]", "'length' is not measured; known: completion_tokens, exact"),
        ("data_prep.sources=[{kind='jsonl', uri='x'}]", "reasoning_gym, which cannot judge the rows"),
        ("data_prep.test_share=0.01", "hold out about 3 prompts"),
    ],
)
def test_contradictions(override, message):
    judged_by_gym = "task.rewards=[{kind='reasoning_gym'}]"
    check_consistency(tiny_config(judged_by_gym))
    overrides = [override, judged_by_gym] if "cannot judge" in message else [override]
    with pytest.raises(UserError, match=message):
        check_consistency(tiny_config(*overrides))


def test_all_configs_agree_with_themselves():
    from components.config import load_run_config

    for path in sorted(Path("configs").glob("*.toml")):
        check_consistency(load_run_config(path))
