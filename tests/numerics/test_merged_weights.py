"""Merged matrices in oneDNN's layout: the products are those of the plain matrices, and nothing stays behind."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tuneloop.models.adapter_io import Adapter
from tuneloop.models.load import load_model
from tuneloop.models.lora import attach, extract, peft_config
from tuneloop.models.lora_linear import project
from tuneloop.models.sources import resolve_model
from tuneloop.rollout import merged_weights
from tuneloop.rollout.merged_weights import MergedWeights
from tuneloop.settings import LoraSettings

needs_kernels = pytest.mark.skipif(
    not merged_weights._has_kernels(), reason="this processor lacks what oneDNN's bfloat16 kernels need (AVX-512)"
)
CHANGED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model_and_adapter(folder: Path, targets: tuple[str, ...] = CHANGED, biased: bool = True) -> tuple[Any, Adapter]:
    base = resolve_model("tiny://qwen2?seed=3", folder)
    model = load_model(base, "bfloat16")
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            if biased:
                torch.nn.init.normal_(module.bias, generator=torch.Generator().manual_seed(1))
            else:
                module.bias = None
    settings = LoraSettings(rank=4, target_modules=list(targets))
    layers = attach(model, settings, 0)
    for layer in layers.values():
        torch.nn.init.normal_(layer.B, std=0.3, generator=torch.Generator().manual_seed(2))
    return model, extract(layers, peft_config(settings, layers, model, str(base)))


def products(model: Any, x: torch.Tensor, merged: MergedWeights) -> list[torch.Tensor]:
    """What the projections of the first layer make of x."""
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    with torch.no_grad(), merged.installed():
        gate, up = project([mlp.gate_proj, mlp.up_proj], x)
        qkv = project([attention.q_proj, attention.k_proj, attention.v_proj], x)
        return [*qkv, attention.o_proj(x), gate, up, mlp.down_proj(gate)]


@needs_kernels
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("targets", [CHANGED, ("q_proj", "v_proj", "up_proj")], ids=["all", "some"])
def test_products_are_those_of_plain_matrices(
    targets: tuple[str, ...], biased: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, adapter = model_and_adapter(tmp_path, targets, biased)
    x = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(4)).bfloat16()
    laid_out = MergedWeights(model)
    laid_out.merge(adapter)
    assert len(laid_out) == len(adapter.factors)
    assert any(len(group) == 3 for group in laid_out._copies) == (targets == CHANGED)
    made = products(model, x, laid_out)
    monkeypatch.setattr(merged_weights, "_has_kernels", lambda: False)
    plain = MergedWeights(model)
    plain.merge(adapter)
    assert all(len(group) == 1 for group in plain._copies)
    for ours, expected in zip(made, products(model, x, plain), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0.01, atol=0.01)  # one bfloat16 step, where a bias is added


@needs_kernels
def test_nothing_stays_behind(tmp_path: Path):
    model, adapter = model_and_adapter(tmp_path)
    q_proj = model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, model.config.hidden_size).bfloat16()
    with torch.no_grad():
        before = q_proj(x)
    merged = MergedWeights(model)
    merged.merge(adapter)
    with pytest.raises(RuntimeError, match="in the midst"), merged.installed():
        raise RuntimeError("in the midst")
    assert "forward" not in q_proj.__dict__
    assert "products" not in q_proj.__dict__
    with torch.no_grad():
        assert torch.equal(q_proj(x), before)
    merged.merge(None)
    assert len(merged) == 0


@needs_kernels
def test_a_second_merge_replaces_the_first(tmp_path: Path):
    model, adapter = model_and_adapter(tmp_path)
    x = torch.randn(5, model.config.hidden_size).bfloat16()
    merged, fresh = MergedWeights(model), MergedWeights(model)
    merged.merge(adapter)
    first = products(model, x, merged)
    doubled = Adapter({name: (a, 2 * b) for name, (a, b) in adapter.factors.items()}, adapter.config)
    merged.merge(doubled)
    fresh.merge(doubled)
    second = products(model, x, merged)
    assert not torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(second, products(model, x, fresh), strict=True))
