"""Layers that are computed again in the backward pass, and models whose weights are not read."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from tests.numerics.distributed_work import batches, one_process
from tuneloop.models.forward import score
from tuneloop.models.load import checkpoint_layers, load_model, reserve_model
from tuneloop.models.packed import pack
from tuneloop.models.sources import resolve_model


def gradient_and_saved(*, checkpointed: bool) -> tuple[torch.Tensor, int]:
    """The adapter's gradient, and the bytes that the forward pass saves for the backward pass."""
    trained, optimizer = one_process("stage1-float32")
    if checkpointed:
        checkpoint_layers(trained.model)
    trained.model.train()
    saved = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = score(trained.model, pack(batches()[0])).logprobs_S.sum()
    optimizer.backward(loss)
    return optimizer.gradient.clone(), saved


def test_checkpointing_gives_the_same_gradient_and_saves_less():
    """The tiny model has two layers; each of them saves its input alone."""
    plain, everything = gradient_and_saved(checkpointed=False)
    again, inputs_only = gradient_and_saved(checkpointed=True)
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-6)
    assert inputs_only < everything / 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of 42 MB."""
    config = Qwen2Config(
        vocab_size=20_000, hidden_size=256, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_reserved_weights_take_no_memory_and_are_those_of_the_model(folder: Path):
    loaded = load_model(folder, "float32", "cpu")
    before = resident_bytes()
    reserved = reserve_model(folder, "float32")
    taken = resident_bytes() - before
    size = sum(parameter.numel() * 4 for parameter in loaded.parameters())
    assert size > 40e6
    assert taken < size / 4
    expected, found = dict(loaded.named_parameters()), dict(reserved.named_parameters())
    assert list(found) == list(expected)  # so a tied head is one parameter in both
    for name, parameter in found.items():
        assert (parameter.shape, parameter.dtype) == (expected[name].shape, expected[name].dtype)
        parameter.data.copy_(expected[name].data)
    batch = pack(batches()[0])
    assert torch.equal(score(reserved, batch).logprobs_S, score(loaded, batch).logprobs_S)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reserved_tiny_models_have_the_loaded_ones_parts(dtype: str):
    path = resolve_model("tiny://qwen2?seed=0")
    loaded, reserved = load_model(path, dtype, "cpu"), reserve_model(path, dtype)
    assert [(n, b.dtype) for n, b in reserved.named_buffers()] == [(n, b.dtype) for n, b in loaded.named_buffers()]
    assert not any(parameter.requires_grad for parameter in reserved.parameters())
    assert not reserved.training
