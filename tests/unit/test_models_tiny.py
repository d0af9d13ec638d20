"""The made-up model: equal settings give equal bits, and everything that a run needs works on it."""

import hashlib

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuneloop.models.sources import resolve_model


def digest(folder) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_equal_settings_give_equal_bits_and_leave_the_random_numbers_alone(tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = resolve_model("tiny://qwen2?seed=3", tmp_path / "a")
    assert torch.equal(torch.rand(3), expected)
    again = resolve_model("tiny://qwen2?seed=3", tmp_path / "b")
    other = resolve_model("tiny://qwen2?seed=4", tmp_path / "b")
    assert digest(first) == digest(again) != digest(other)
    # The order and the spelling of defaults name the same model.
    assert resolve_model("tiny://qwen2?layers=2&seed=3", tmp_path / "b") == again


def test_options_decide_the_architecture(tmp_path):
    uri = "tiny://qwen2?hidden_size=32&layers=3&heads=2&kv_heads=1&intermediate_size=48&max_position=96&tied=1"
    model = AutoModelForCausalLM.from_pretrained(resolve_model(uri + "&dtype=bfloat16", tmp_path))
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("qwen2", 32, 3)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 48)
    assert (config.max_position_embeddings, config.tie_word_embeddings, model.dtype) == (96, True, torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_keep_activations_near_unit_variance(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny://qwen2", tmp_path))
    with torch.no_grad():
        logits = model(torch.arange(64)[None]).logits
    assert 0.5 < logits.std() < 2.0


@pytest.mark.parametrize("text", ["What is 23+45?", "äöü 猫 🐈 \n\ttab", "<|im_start|>user\nhi<|im_end|>\n"])
def test_every_text_survives_the_tokenizer(text, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny://qwen2", tmp_path))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    plain = text.replace("<|im_start|>", "").replace("<|im_end|>", "")
    assert len(ids) == len(plain.encode()) + (2 if plain != text else 0)


def test_chat_template_is_chatml(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tiny://qwen2", tmp_path))
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert len(tokenizer) == 259
