"""A model's dimensions from config.json, against transformers' own models and published counts."""

import json
import subprocess
import sys

import pytest

from tuneloop.errors import UserError
from tuneloop.plan.shapes import PUBLISHED, find_shape, parse_shape, read_shape


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-0.5b-instruct", 494_032_768),
        ("qwen2.5-7b-instruct", 7_615_616_512),
        ("qwen2.5-72b-instruct", 72_706_203_648),
        ("smollm2-135m-instruct", 134_515_008),
    ],
)
def test_published_counts(name, parameters):
    assert read_shape(PUBLISHED / f"{name}.json").parameters == parameters


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
        ("LlamaConfig", {"head_dim": 32, "tie_word_embeddings": True}),
        ("MistralConfig", {}),
        ("Qwen2Config", {}),
        ("Qwen3Config", {"head_dim": 24}),
    ],
)
def test_every_tensor_is_that_of_transformers(config_class, options, tmp_path):
    import torch
    import transformers

    config = getattr(transformers, config_class)(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=112, **options,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path / "config.json")
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert shape.tensors() == expected


def test_found_by_uri_without_weights_and_without_torch(tmp_path):
    config = json.loads((PUBLISHED / "qwen2.5-0.5b-instruct.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert find_shape(str(tmp_path)).layers == 3
    assert find_shape(f"file://{tmp_path}").layers == 3
    assert find_shape("hf://Qwen/Qwen2.5-7B-Instruct@main").layers == 28
    assert find_shape("bundled://smollm2-135m-instruct").layers == 30
    assert find_shape("tiny://qwen2?layers=5&tied=1").layers == 5
    code = (
        "import sys; from tuneloop.plan.shapes import find_shape; find_shape('tiny://qwen2?layers=5');"
        "sys.exit(bool({'torch', 'transformers', 'kfp'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_tiny_is_the_model_that_is_made():
    from tuneloop.models.sources import resolve_model

    uri = "tiny://qwen2?seed=0"
    assert find_shape(uri) == read_shape(resolve_model(uri) / "config.json")


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="model_type 'gpt2' cannot be planned for; known: llama"):
        parse_shape({"model_type": "gpt2"}, "x")
    with pytest.raises(UserError, match="no usable 'hidden_size'"):
        parse_shape({"model_type": "llama", "num_attention_heads": 4}, "x")
    with pytest.raises(UserError, match="--model-config"):
        find_shape("s3://bucket/model")
    with pytest.raises(UserError, match="--model-config"):
        find_shape(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="no JSON object"):
        find_shape(str(tmp_path))
