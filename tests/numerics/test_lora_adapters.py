"""LoRA layers as adapters: every init, one scaling for vLLM and PEFT alike, and continuing from an existing one."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tuneloop.errors import UserError
from tuneloop.models.adapter_io import Adapter, load_adapter, save_adapter
from tuneloop.models.forward import score
from tuneloop.models.load import load_model
from tuneloop.models.lora import attach, attach_adapter, describe_targets, extract, peft_config, require_fit
from tuneloop.models.lora_init import initial_a, right_singular_vectors
from tuneloop.models.packed import pack
from tuneloop.models.sources import resolve_model
from tuneloop.settings import LoraSettings
from tuneloop.training.reference import ReferencePolicy

INITS = ("kaiming", "gaussian", "orthogonal", "svd")
BATCH = ([5, 6, 7, 8], [[9, 10, 11], [12]])


@pytest.fixture(scope="module")
def base() -> Path:
    return resolve_model("tiny://qwen2?seed=0")


def trained(base: Path, settings: LoraSettings, dtype: str = "float32"):
    """A model with an adapter that changes what it says."""
    model = load_model(base, dtype, "cpu")
    layers = attach(model, settings, seed=3)
    generator = torch.Generator().manual_seed(4)
    for layer in layers.values():
        layer.B.data.copy_(torch.randn(layer.B.shape, generator=generator) * 0.05)
    return model, layers, peft_config(settings, layers, model, str(base))


@torch.no_grad()
def logprobs(model) -> torch.Tensor:
    return score(model, pack([BATCH])).logprobs_S


# Inits


@pytest.mark.parametrize("init", INITS)
def test_fresh_adapter_of_every_init_leaves_the_function_alone(base: Path, init):
    model = load_model(base, "float32", "cpu")
    before = logprobs(model)
    layers = attach(model, LoraSettings(rank=8, init=init), seed=1)
    assert torch.equal(logprobs(model), before)
    assert all(layer.A.any() and not layer.B.any() for layer in layers.values())


@pytest.mark.parametrize("init", INITS)
def test_rows_of_a_have_a_squared_norm_of_a_third(init):
    """Kaiming: uniform within b = 1/sqrt(64), variance b^2/3, times 64 entries: 1/3. The others are made equal."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    a_RI = initial_a(init, weight, 32, torch.Generator().manual_seed(1))
    assert a_RI.shape == (32, 64)
    assert float(a_RI.square().sum(1).mean()) == pytest.approx(1 / 3, rel=0.1)  # 2,048 draws
    assert torch.equal(a_RI, initial_a(init, weight, 32, torch.Generator().manual_seed(1)))
    assert init == "svd" or not torch.equal(a_RI, initial_a(init, weight, 32, torch.Generator().manual_seed(2)))


def test_distributions_of_the_random_inits():
    weight = torch.zeros(64, 64)
    kaiming = initial_a("kaiming", weight, 64, torch.Generator().manual_seed(0))
    gaussian = initial_a("gaussian", weight, 64, torch.Generator().manual_seed(0))
    assert float(kaiming.abs().max()) <= 1 / 8 < float(gaussian.abs().max())  # bounded by 1/sqrt(64), and not
    assert float(gaussian.std()) == pytest.approx(1 / math.sqrt(3 * 64), rel=0.05)


def test_orthogonal_rows_are_orthogonal():
    a_RI = initial_a("orthogonal", torch.zeros(48, 40), 8, torch.Generator().manual_seed(1))
    torch.testing.assert_close(a_RI @ a_RI.T, torch.eye(8) / 3, rtol=0, atol=1e-6)


def test_svd_rows_are_the_weights_leading_right_singular_vectors():
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(50, 30, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(30, 30, generator=generator)).Q
    weight = left * torch.linspace(3.0, 0.1, 30) @ right.T  # right's columns are the right singular vectors, in order
    rows = right_singular_vectors(weight, 6, torch.Generator().manual_seed(1))
    torch.testing.assert_close((rows @ right[:, :6]).abs(), torch.eye(6), rtol=0, atol=1e-3)
    following = initial_a("svd", weight, 2, torch.Generator().manual_seed(1), first=4)
    torch.testing.assert_close((following @ right[:, 4:6]).abs(), torch.eye(2) / math.sqrt(3), rtol=0, atol=1e-3)


# What others compute with the exported adapter

PATTERNS = {
    "one rank": LoraSettings(rank=4, alpha=8.0),
    "rslora": LoraSettings(rank=4, alpha=8.0, rslora=True),
    "powers of two": LoraSettings(rank=4, alpha=8.0, rank_pattern={"q_proj": 1, "0.mlp.down_proj": 16}),
    "other ratios": LoraSettings(rank=6, alpha=10.0, rank_pattern={"v_proj": 5}, alpha_pattern={"o_proj": 3.0}),
    "rslora with ranks": LoraSettings(rank=4, alpha=8.0, rslora=True, rank_pattern={"up_proj": 7}),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_peft_computes_what_was_trained(base: Path, tmp_path: Path, name: str):
    model, layers, config = trained(base, PATTERNS[name])
    save_adapter(extract(layers, config), tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    prompt, completions = BATCH
    with torch.no_grad():
        gathered = []
        for completion in completions:
            table = theirs(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            gathered.append(table.gather(1, torch.tensor(completion)[:, None]).squeeze(1))
    torch.testing.assert_close(torch.cat(gathered), logprobs(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PATTERNS)
def test_one_alpha_and_rank_hold_for_every_module_as_vllm_applies_them(base: Path, name: str):
    """vLLM multiplies every B·A with lora_alpha / r (over sqrt(r) with rsLoRA) and reads no patterns."""
    _, layers, config = trained(base, PATTERNS[name])
    adapter = extract(layers, config)
    divisor = math.sqrt(adapter.config["r"]) if adapter.config["use_rslora"] else adapter.config["r"]
    scaling = adapter.config["lora_alpha"] / divisor
    assert adapter.config["r"] == max(a.shape[0] for a, _ in adapter.factors.values())
    for module, layer in layers.items():
        a, b = adapter.factors[module]
        assert adapter.scaling(module) == scaling
        torch.testing.assert_close(scaling * (b @ a), layer.scaling * (layer.B @ layer.A), rtol=1e-5, atol=1e-7)


def test_ratios_that_are_powers_of_two_fold_without_rounding(base: Path):
    """alpha 8: rank 4 scales by 2, rank 1 by 8 and rank 16 by 1/2, so B is multiplied by 4 and by 1/4."""
    _, layers, config = trained(base, PATTERNS["powers of two"], "bfloat16")
    factors = extract(layers, config).factors
    name = "model.layers.{}.{}".format
    for module, ratio in (
        (name(0, "self_attn.q_proj"), 4.0),
        (name(0, "mlp.down_proj"), 0.25),
        (name(1, "mlp.down_proj"), 1.0),
    ):
        assert factors[module][1].dtype == torch.bfloat16
        assert torch.equal(factors[module][1], layers[module].B.detach() * ratio)


def test_other_ratios_fold_in_fp32(base: Path):
    _, layers, config = trained(base, PATTERNS["other ratios"], "bfloat16")
    module = "model.layers.0.self_attn.v_proj"  # 10/5 = 2 against 10/6: 1.2 times
    b = extract(layers, config).factors[module][1]
    assert b.dtype == torch.float32
    torch.testing.assert_close(b, layers[module].B.detach().float() * 1.2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PATTERNS)
def test_continuing_gives_back_factors_and_scaling(base: Path, name: str, dtype: str):
    settings = PATTERNS[name]
    _, layers, config = trained(base, settings, dtype)
    adapter = extract(layers, config)
    again = attach_adapter(load_model(base, dtype, "cpu"), adapter, settings=settings)
    for module, layer in layers.items():
        assert again[module].scaling == layer.scaling
        assert torch.equal(again[module].A, layer.A)
        torch.testing.assert_close(again[module].B, layer.B, rtol=0 if dtype == "bfloat16" else 2e-7, atol=0)


def test_digest_is_of_what_is_computed(base: Path):
    """Ranks, alphas and patterns of the config change nothing when the layers decide them."""
    _, layers, config = trained(base, PATTERNS["powers of two"])
    one, other = extract(layers, config), extract(layers, {**config, "r": 99, "lora_alpha": 1.0, "rank_pattern": {}})
    assert one.digest() == other.digest()
    next(iter(layers.values())).scaling *= 2
    assert extract(layers, config).digest() != one.digest()


def test_reference_of_an_adapter_with_folded_ratios_scores_as_the_layers_do(base: Path):
    model, layers, config = trained(base, PATTERNS["other ratios"])
    before = logprobs(model)
    reference = ReferencePolicy(model, layers, extract(layers, config))
    for layer in layers.values():
        layer.B.data.mul_(2.0)
    torch.testing.assert_close(reference.logprobs(pack([BATCH]), 1.0), before, rtol=1e-6, atol=1e-6)
    assert float((logprobs(model) - before).abs().max()) > 1e-3


# Continuing from an adapter that is there already


def test_adapter_of_another_alpha_keeps_its_function(base: Path):
    model, layers, config = trained(base, LoraSettings(rank=4, alpha=8.0))
    expected = logprobs(model)
    fresh = load_model(base, "float32", "cpu")
    continued = attach_adapter(fresh, extract(layers, config), settings=LoraSettings(rank=4, alpha=32.0))
    torch.testing.assert_close(logprobs(fresh), expected, rtol=1e-6, atol=1e-6)
    assert {layer.scaling for layer in continued.values()} == {8.0}


REFUSALS = [
    ({"rank": 8}, False, 'has rank 4 at .*, but the config says 8; set lora.rank = "auto"'),
    ({"rank": 4, "target_modules": "mlp"}, False, "has .*self_attn.*, which lora.target_modules leaves out"),
    ({"rank": 4, "rank_pattern": {"q_proj": 2}}, True, "has rank 4 at .*q_proj, but the config says 2"),
]


@pytest.mark.parametrize(("settings", "any_rank", "says"), REFUSALS)
def test_adapter_that_does_not_fit_is_refused(base: Path, settings, any_rank, says):
    _, layers, config = trained(base, LoraSettings(rank=4))
    adapter, model = extract(layers, config), load_model(base, "float32", "cpu")
    with pytest.raises(UserError, match=says):
        require_fit(model, adapter, LoraSettings(start_from="x", **settings), any_rank=any_rank)
    require_fit(model, adapter, LoraSettings(rank=4), any_rank=False)
    require_fit(model, adapter, LoraSettings(rank=8), any_rank=True)


def test_missing_module_is_named(base: Path):
    _, layers, config = trained(base, LoraSettings(rank=4, target_modules="mlp"))
    with pytest.raises(UserError, match=r"lacks model\.layers\.0\.self_attn\.k_proj, which lora.target_modules names"):
        require_fit(load_model(base, "float32", "cpu"), extract(layers, config), LoraSettings(rank=4), any_rank=False)


def test_saved_patterns_are_read_back(base: Path, tmp_path: Path):
    _, layers, config = trained(base, PATTERNS["powers of two"])
    adapter = extract(layers, config)
    save_adapter(adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == {
        "q_proj": 1, **{f"model.layers.1.mlp.{leaf}": 4 for leaf in ("down_proj",)},
        "k_proj": 4, "v_proj": 4, "o_proj": 4, "gate_proj": 4, "up_proj": 4,
    }  # fmt: skip
    assert load_adapter(tmp_path).digest() == adapter.digest()
    assert "rank 16" in describe_targets(layers)


def test_empty_config_is_enough(base: Path):
    """Whoever only wants what the layers compute gives no settings."""
    _, layers, _ = trained(base, LoraSettings(rank=4, alpha=8.0))
    adapter = extract(layers, {})
    assert isinstance(adapter, Adapter)
    assert (adapter.config["r"], adapter.config["lora_alpha"]) == (4, 8.0)
