"""Merging: exact deltas by hand, one unbiased rounding, every kind of adapter, and nothing left when it fails.

Factors are small multiples of powers of two wherever results are compared bit by bit: products and sums are then exact
in fp32, whatever the order of summation.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tuneloop.errors import UserError
from tuneloop.models import merge as merge_module
from tuneloop.models.adapter_io import Adapter, save_adapter
from tuneloop.models.merge import merge_adapter
from tuneloop.models.rounding import fold, round_unbiased
from tuneloop.models.safetensors_shards import ShardWriter, TensorSpec
from tuneloop.models.tiny import byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
SETTINGS: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "bias": "none"}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def make_base(folder: Path, model: Any) -> Path:
    torch.manual_seed(0)
    model.init_weights()
    model.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("llama"), LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16())


@pytest.fixture(scope="module")
def bases(llama, tmp_path_factory) -> dict[str, Path]:
    models = {
        "llama-tied": LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES)),
        "qwen2-tied": Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)).bfloat16(),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=64)),
    }
    return {name: make_base(tmp_path_factory.mktemp(name), model) for name, model in models.items()} | {"llama": llama}


def exact(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Random multiples of 1/64 in [-1/16, 1/16]."""
    return torch.randint(-4, 5, (rows, columns), generator=torch.Generator().manual_seed(seed)) / 64


def adapter_folder(folder: Path, modules: dict[str, tuple[int, int, int]], **settings: Any) -> Path:
    """An adapter with exact factors; `modules` maps a name to (out, in, rank)."""
    factors = {
        name: (exact(rank, inner, 2 * number), exact(outer, rank, 2 * number + 1))
        for number, (name, (outer, inner, rank)) in enumerate(modules.items())
    }
    leaves = sorted({name.rpartition(".")[2] for name in modules})
    save_adapter(Adapter(factors, {**SETTINGS, "target_modules": leaves, **settings}), folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def factors_of(adapter: Path, module: str) -> tuple[torch.Tensor, torch.Tensor]:
    stored = load_file(adapter / "adapter_model.safetensors")
    return (
        stored[f"base_model.model.{module}.lora_A.weight"],
        stored[f"base_model.model.{module}.lora_B.weight"],
    )


def test_delta_by_hand(llama, tmp_path):
    """rank 1, alpha 4: scaling 4. A = [1, 0, …], B = [1/2, 1/4, 0, …]: W[0,0] grows by 4·1/2 = 2, W[1,0] by 1."""
    a, b = torch.zeros(1, 16), torch.zeros(16, 1)
    a[0, 0], b[0, 0], b[1, 0] = 1.0, 0.5, 0.25
    adapter = Adapter({Q: (a, b)}, {**SETTINGS, "r": 1, "target_modules": [Q]})
    save_adapter(adapter, tmp_path / "adapter")
    result = merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    before, after = tensors(llama), tensors(tmp_path / "merged")
    change = after[f"{Q}.weight"] - before[f"{Q}.weight"].float()
    expected = torch.zeros(16, 16)
    expected[0, 0], expected[1, 0] = 2.0, 1.0
    assert torch.allclose(change, expected, atol=1e-7)
    assert (result.merged_modules, result.dtype, result.adapter_digest) == (1, "float32", adapter.digest())
    assert result.changed_share == 2 / 256
    for name in before.keys() - {f"{Q}.weight"}:
        assert torch.equal(after[name], before[name].float()), name


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "qwen2-tied"])
def test_every_target_is_merged_exactly_and_nothing_else_changes(name, bases, tmp_path):
    before = tensors(bases[name])
    modules = {key.removesuffix(".weight"): tensor for key, tensor in before.items() if "proj.weight" in key}
    adapter = adapter_folder(tmp_path / "adapter", {key: (*tensor.shape, 2) for key, tensor in modules.items()})
    result = merge_adapter(bases[name], adapter, tmp_path / "merged")
    assert result.merged_modules == len(modules) == 14
    after = tensors(tmp_path / "merged")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        if key.removesuffix(".weight") in modules:
            a, b = factors_of(adapter, key.removesuffix(".weight"))
            tensor = round_unbiased(tensor.float() + (b @ a) * (4 / 2), tensor.dtype)
        assert torch.equal(after[key], tensor), key


def test_the_sum_is_rounded_once_and_without_bias(tmp_path):
    """W is 1 everywhere, its grid step 1/128. A delta of 1/1024 gives 1 or 1 + 1/128, the latter in 1 of 8 elements;
    one of 1/128 is kept as it is. Rounding to the nearest would lose the first, whatever the number of elements."""
    base = make_base(tmp_path / "base", LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 256})).bfloat16())
    weights = {name: torch.ones_like(tensor) for name, tensor in tensors(base).items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    b = torch.full((256, 1), 1 / 1024)
    b[128:] = 1 / 128
    save_adapter(
        Adapter({Q: (torch.ones(1, 256), b)}, {**SETTINGS, "r": 1, "lora_alpha": 1, "target_modules": [Q]}),
        tmp_path / "adapter",
    )
    result = merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged = tensors(tmp_path / "merged")[f"{Q}.weight"]
    assert merged.dtype == torch.bfloat16
    raised = merged[:128] == 1 + 1 / 128
    assert torch.equal(merged[:128], torch.where(raised, 1 + 1 / 128, 1.0).bfloat16())
    # 128·256 draws with a chance of 1/8: the standard deviation of the share is 0.0018.
    assert abs(raised.float().mean() - 1 / 8) < 0.006
    assert (merged[128:] == 1 + 1 / 128).all()
    assert result.changed_share == pytest.approx(0.5 + 0.5 / 8, abs=0.003)


def test_the_merge_has_the_bits_that_the_rollout_engine_samples_from(tmp_path):
    """More than one piece a matrix, random factors; a base in bfloat16, and one in float32 that loads as bfloat16."""
    sizes = {**SIZES, "hidden_size": 512, "intermediate_size": 2200}
    narrow = make_base(tmp_path / "narrow", LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16())
    wide = make_base(tmp_path / "wide", LlamaForCausalLM(LlamaConfig(**sizes)))
    exact_in_wide = tensors(wide)[f"{DOWN}.weight"]
    assert not torch.equal(exact_in_wide.bfloat16().float(), exact_in_wide)
    modules = {DOWN: (512, 2200, 8), "model.layers.0.mlp.up_proj": (2200, 512, 8)}
    generator = torch.Generator().manual_seed(3)
    factors = {
        name: (torch.randn(rank, inner, generator=generator), torch.randn(outer, rank, generator=generator) / 1000)
        for name, (outer, inner, rank) in modules.items()
    }
    adapter = Adapter(factors, {**SETTINGS, "r": 8, "target_modules": list(modules)})
    save_adapter(adapter, tmp_path / "adapter")
    for base in (narrow, wide):
        merge_adapter(base, tmp_path / "adapter", tmp_path / f"{base.name}-merged", dtype="bfloat16")
        before, after = tensors(base), tensors(tmp_path / f"{base.name}-merged")
        for name, (a, b) in factors.items():
            weight = before[f"{name}.weight"].bfloat16()
            expected = torch.empty_like(weight)
            fold(weight, a, b, adapter.scaling(name), expected)
            assert torch.equal(after[f"{name}.weight"], expected), name


def test_rslora_and_patterns_decide_the_scaling(llama, tmp_path):
    """rsLoRA: alpha/sqrt(rank). q_proj: rank 4 by pattern, 8/sqrt(4) = 4; down_proj: alpha 2 by pattern, 2/sqrt(2)."""
    adapter = adapter_folder(
        tmp_path / "adapter",
        {Q: (16, 16, 4), DOWN: (16, 24, 2)},
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"q_proj": 4},
        alpha_pattern={r"layers\.1\.mlp\.down_proj": 2},
    )
    merge_adapter(llama, adapter, tmp_path / "merged", dtype="float32")
    before, after = tensors(llama), tensors(tmp_path / "merged")
    for module, scaling in {Q: 4.0, DOWN: 2 / 2**0.5}.items():
        a, b = factors_of(adapter, module)
        assert torch.equal(after[f"{module}.weight"], (b @ a) * scaling + before[f"{module}.weight"].float()), module


@pytest.mark.parametrize("name", ["llama", "qwen2-tied", "gpt2"])
def test_merged_logits_are_those_of_peft(name, bases, tmp_path):
    """Random factors, rsLoRA and patterns, made and computed by PEFT; gpt2's layers store their weights transposed."""
    torch.manual_seed(1)
    leaf = "c_attn" if name == "gpt2" else "q_proj"
    options: dict[str, Any] = {"rank_pattern": {leaf: 3}, "alpha_pattern": {leaf: 5}, "use_rslora": True}
    base = AutoModelForCausalLM.from_pretrained(bases[name], dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options))
    for parameter_name, parameter in tuned.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(tmp_path / "adapter")
    merge_adapter(bases[name], tmp_path / "adapter", tmp_path / "merged", dtype="float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected, actual = tuned(ids).logits, merged(ids).logits
        with tuned.disable_adapter():
            assert (tuned(ids).logits - expected).abs().max() > 0.01
    assert torch.allclose(actual, expected, atol=1e-5)


def test_pieces_give_what_a_whole_gives(llama, tmp_path, monkeypatch):
    adapter = adapter_folder(tmp_path / "adapter", {DOWN: (16, 24, 2), Q: (16, 16, 2)})
    merge_adapter(llama, adapter, tmp_path / "whole", dtype="float32")
    monkeypatch.setattr(merge_module, "PERIOD", 50)  # 2 rows of 24, 3 rows of 16
    merge_adapter(llama, adapter, tmp_path / "pieces", dtype="float32")
    whole, pieces = tensors(tmp_path / "whole"), tensors(tmp_path / "pieces")
    assert all(torch.equal(pieces[name], whole[name]) for name in whole)


def test_shards_keep_to_the_limit_and_the_index_finds_every_tensor(llama, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", {Q: (16, 16, 2), DOWN: (16, 24, 2)})
    limit = 2100  # embeddings and head have 64·16·2 = 2,048 bytes
    result = merge_adapter(llama, adapter, tmp_path / "sharded", max_shard_bytes=limit)
    merge_adapter(llama, adapter, tmp_path / "single")
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert result.shards == len(files) > 3
    assert files[0].name == f"model-00001-of-{result.shards:05d}.safetensors"
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    single = tensors(tmp_path / "single")
    assert index["metadata"]["total_size"] == result.bytes == sum(tensor.nbytes for tensor in single.values())
    for file in files:
        held = load_file(file)
        assert sum(tensor.nbytes for tensor in held.values()) <= limit
        assert held.keys() == {name for name, where in index["weight_map"].items() if where == file.name}
        assert all(torch.equal(tensor, single[name]) for name, tensor in held.items())
    assert not (tmp_path / "single" / "model.safetensors.index.json").exists()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")
    assert torch.equal(model.state_dict()[f"{Q}.weight"], single[f"{Q}.weight"])
    # A sharded output is a base like any other.
    merge_adapter(tmp_path / "sharded", adapter, tmp_path / "again")
    again = tensors(tmp_path / "again")
    a, b = factors_of(adapter, Q)
    assert torch.equal(
        again[f"{Q}.weight"], round_unbiased(single[f"{Q}.weight"].float() + (b @ a) * 2, torch.bfloat16)
    )


def test_the_output_is_whole_and_its_bits_are_the_same_each_time(llama, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", {Q: (16, 16, 2)})
    digests = []
    for name in ("one", "two"):
        merge_adapter(llama, adapter, tmp_path / name, dtype="float16")
        files = {file.name: file.read_bytes() for file in sorted((tmp_path / name).iterdir())}
        digests.append({file: hashlib.sha256(data).hexdigest() for file, data in files.items()})
    assert digests[0] == digests[1]
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"} < set(files)
    assert json.loads(files["config.json"])["dtype"] == "float16"
    assert json.loads((llama / "config.json").read_text())["dtype"] == "bfloat16"
    card = (tmp_path / "one" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert str(llama) in card


def test_peers_load_adapter_and_merged_model_without_our_code(llama, tmp_path):
    """Plain transformers and plain peft, in a process that cannot import this project."""
    modules = {f"model.layers.{layer}.self_attn.q_proj": (16, 16, 2) for layer in range(2)}
    adapter = adapter_folder(tmp_path / "adapter", modules)
    merge_adapter(llama, adapter, tmp_path / "merged", dtype="float32", max_shard_bytes=4000)
    code = f"""
import sys
sys.modules["tuneloop"] = None  # importing it from here on is an error
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(llama)!r}, dtype=torch.float32)
tuned = PeftModel.from_pretrained(base, {str(adapter)!r})
merged, loading = AutoModelForCausalLM.from_pretrained({str(tmp_path / "merged")!r}, output_loading_info=True)
assert not any(loading.values()), loading
ids = torch.arange(40)[None]
with torch.no_grad():
    print(float((merged(ids).logits - tuned(ids).logits).abs().max()))
"""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True cannot be merged"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\] cannot be merged"),
        ({"bias": "all"}, "bias = 'all' cannot be merged"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "also changed the base"),
        ({"peft_type": "IA3"}, "only LoRA is supported"),
        ({"r": 3}, "do not have the configured rank 3"),
    ],
)
def test_what_a_merge_would_lose_is_refused(settings, message, llama, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", {Q: (16, 16, 2)}, **settings)
    with pytest.raises(UserError, match=message):
        merge_adapter(llama, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_adapter_that_changes_nothing_is_refused(llama, tmp_path):
    adapter = Adapter({Q: (torch.ones(2, 16), torch.zeros(16, 2))}, {**SETTINGS, "target_modules": [Q]})
    save_adapter(adapter, tmp_path / "adapter")
    with pytest.raises(UserError, match="changes nothing"):
        merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged")
    tiny = Adapter({Q: (torch.full((2, 16), 1e-12), torch.full((16, 2), 1e-12))}, adapter.config)
    save_adapter(tiny, tmp_path / "adapter")
    with pytest.raises(UserError, match=r"lost in rounding to bfloat16; set merge_adapter\.dtype to float32"):
        merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged")
    broken = Adapter({Q: (torch.full((2, 16), float("nan")), torch.ones(16, 2))}, adapter.config)
    save_adapter(broken, tmp_path / "adapter")
    with pytest.raises(UserError, match="not finite"):
        merge_adapter(llama, tmp_path / "adapter", tmp_path / "merged")


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"model.layers.5.self_attn.q_proj": (16, 16, 2)}, r"has no model\.layers\.5\.self_attn\.q_proj"),
        ({Q: (16, 16, 2), DOWN: (16, 20, 2)}, r"has shape \[16, 24\], but the adapter was trained on \[16, 20\]"),
    ],
)
def test_an_adapter_of_another_base_is_refused(modules, message, llama, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", modules)
    with pytest.raises(UserError, match=message):
        merge_adapter(llama, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_the_output_head_is_merged_unless_it_is_tied(bases, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", {"lm_head": (64, 16, 2)})
    merge_adapter(bases["llama"], adapter, tmp_path / "merged")
    a, b = factors_of(adapter, "lm_head")
    before, after = tensors(bases["llama"]), tensors(tmp_path / "merged")
    total = before["lm_head.weight"].float() + (b @ a) * 2
    assert torch.equal(after["lm_head.weight"], round_unbiased(total, torch.bfloat16))
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    with pytest.raises(UserError, match="changes lm_head, which this base ties"):
        merge_adapter(bases["llama-tied"], adapter, tmp_path / "tied")


def test_values_beyond_float16_and_quantised_bases_are_refused(llama, tmp_path):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    weights = tensors(base)
    weights["model.norm.weight"][0] = 1e5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_folder(tmp_path / "adapter", {Q: (16, 16, 2)})
    with pytest.raises(UserError, match=r"model\.norm\.weight: has values beyond float16's range"):
        merge_adapter(base, adapter, tmp_path / "merged", dtype="float16")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(UserError, match="name the unquantised model"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("damage", ["cut", "header", "offsets", "empty", "twice"])
def test_a_damaged_base_is_refused(damage, llama, tmp_path):
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    file = base / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if damage == "twice":
        file.rename(base / "a.safetensors")
        shutil.copy(base / "a.safetensors", base / "b.safetensors")
        (base / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
        )
    else:
        header = json.loads(data[8 : 8 + length])
        header[f"{Q}.weight"]["data_offsets"][1] -= 2
        shorter = json.dumps(header).encode()
        damaged = {
            "cut": data[:-10],
            "header": data[:20] + b"\xff" + data[21:],
            "offsets": len(shorter).to_bytes(8, "little") + shorter + data[8 + length :],
            "empty": b"",
        }
        file.write_bytes(damaged[damage])
    adapter = adapter_folder(tmp_path / "adapter", {Q: (16, 16, 2)})
    with pytest.raises(UserError, match="is also in a.safetensors" if damage == "twice" else "damaged or cut off"):
        merge_adapter(base, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_failure_half_way_leaves_nothing(llama, tmp_path, monkeypatch):
    adapter = adapter_folder(tmp_path / "adapter", {Q: (16, 16, 2)})
    write, calls = ShardWriter.write, []

    def full_disk(self: ShardWriter, spec: TensorSpec, start: int, values: torch.Tensor) -> None:
        calls.append(spec.name)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        write(self, spec, start, values)

    monkeypatch.setattr(ShardWriter, "write", full_disk)
    with pytest.raises(OSError, match="No space left"):
        merge_adapter(llama, adapter, tmp_path / "merged", max_shard_bytes=2100)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_killed_merge_leaves_no_output_and_the_next_one_succeeds(llama, tmp_path, monkeypatch):
    adapter = adapter_folder(tmp_path / "adapter", {Q: (16, 16, 2)})
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(ShardWriter, "write", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
        try:
            merge_adapter(llama, adapter, tmp_path / "merged")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == [".merged.partial", "adapter"]
    merge_adapter(llama, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "merged"]
    with pytest.raises(UserError, match="already exists"):
        merge_adapter(llama, adapter, tmp_path / "merged")


def test_memory_does_not_grow_with_the_model(tmp_path):
    """A 324 MB model of eight square layers in one shard needs less than 110 MB beyond what importing needed."""
    code = f"""
import json, torch
from pathlib import Path
from tuneloop.models.adapter_io import Adapter, save_adapter
from tuneloop.models.merge import merge_adapter
from tuneloop.models.rounding import fold, round_unbiased
from tuneloop.models.safetensors_shards import ShardWriter, TensorSpec
from tuneloop.models.tiny import byte_tokenizer

def high_water():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) * 1024

folder = Path({str(tmp_path)!r})
(folder / "base").mkdir()
names = [f"layers.{{number}}.up_proj" for number in range(8)]
row = torch.linspace(-1, 1, 4500).bfloat16()
specs = [TensorSpec(f"{{name}}.weight", "BF16", (4500, 4500)) for name in names]
writer = ShardWriter(folder / "base" / "model.safetensors", specs)
for spec in specs:
    for number in range(4500):
        writer.write(spec, number * 4500, row)
writer.finish()
(folder / "base" / "config.json").write_text("{{}}")
byte_tokenizer().save(str(folder / "base" / "tokenizer.json"))
factors = {{name: (torch.ones(4, 4500), torch.ones(4500, 4)) for name in names}}
settings = {{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}}
save_adapter(Adapter(factors, settings), folder / "adapter")
torch.mm(torch.ones(64, 64), torch.ones(64, 64))
before = high_water()
result = merge_adapter(folder / "base", folder / "adapter", folder / "merged")
print(json.dumps([result.bytes, high_water() - before]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # each of the workers holds a few pieces
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    size, growth = json.loads(done.stdout.splitlines()[-1])
    assert size == 8 * 4500 * 4500 * 2
    assert growth < 110e6


def test_peft_reads_what_was_merged_from(llama, tmp_path):
    """The scaling that a merge uses is the one that PEFT computes with, module by module."""
    adapter = adapter_folder(
        tmp_path / "adapter", {Q: (16, 16, 4)}, target_modules=[Q], rank_pattern={"q_proj": 4}, use_rslora=True
    )
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    layer: Any = PeftModel.from_pretrained(base, str(adapter)).get_submodule(f"base_model.model.{Q}")
    assert layer.scaling["default"] == 4 / 4**0.5
    merge_adapter(llama, adapter, tmp_path / "merged", dtype="float32")
    change = tensors(tmp_path / "merged")[f"{Q}.weight"] - tensors(llama)[f"{Q}.weight"].float()
    assert torch.allclose(change, layer.get_delta_weight("default"), atol=1e-7)
