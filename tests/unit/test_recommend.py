"""Rank and learning rate by size, by hand, and what is called odd."""

import pytest

from components.auto import chosen, resolve_auto, warnings
from tests.tiny_run import tiny_config
from tuneloop.errors import UserError
from tuneloop.models.recommend import ModelSize, read_model_size, recommend_learning_rate, recommend_rank, resolve_lora
from tuneloop.models.sources import resolve_model
from tuneloop.settings import LoraSettings, OptimizerSettings

AUTO = ('lora.rank="auto"', 'sft_warmup.optimizer.learning_rate="auto"', 'lora_rl.optimizer.learning_rate="auto"')


@pytest.mark.parametrize(
    ("billions", "rank"),
    [
        (0.1, 32),
        (0.5, 32),
        (1.2, 32),  # 32 * 2.4^(1/3) = 42.8, of which 32 is nearer than 64 (in powers: 2^5.42)
        (1.5, 64),  # 32 * 3^(1/3) = 46.2 = 2^5.53
        (7.6, 64),  # 32 * 15.2^(1/3) = 79.3 = 2^6.31
        (14.0, 128),  # 32 * 28^(1/3) = 97.2 = 2^6.60
        (32.0, 128),
        (72.0, 128),
    ],
)
def test_rank_by_size(billions: float, rank: int):
    assert recommend_rank(round(billions * 1e9)) == rank


@pytest.mark.parametrize(
    ("billions", "method", "mode", "updates", "rate"),
    [
        (0.5, "sft", "full", 500, 3e-5),
        (0.5, "sft", "lora", 500, 3e-4),  # ten times
        (0.5, "sft", "lora", 99, 4.5e-4),  # fifteen times in a short run
        (0.5, "sft", "full", 99, 3e-5),
        (0.5, "rl", "full", 50, 1e-5),
        (0.5, "rl", "lora", 50, 1e-4),  # ten times, short or not
        (4.0, "rl", "lora", 500, 5.5e-5),  # half way in powers: 1e-4 * 0.3^(1/2) = 5.48e-5
        (4.0, "sft", "full", 500, 1.7e-5),  # 3e-5 * 3^(-1/2) = 1.73e-5
        (72.0, "rl", "lora", 500, 3e-5),
        (72.0, "sft", "lora", 500, 1e-4),
    ],
)
def test_rate_by_size_method_and_length(billions, method, mode, updates, rate):
    assert recommend_learning_rate(round(billions * 1e9), method, mode, updates) == pytest.approx(rate, rel=1e-9)


def test_size_is_read_from_the_headers():
    """Hidden 64, two layers: see the tiny model; its head is tied and counts once."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = resolve_model("tiny://qwen2?seed=0")
    size = read_model_size(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    linear = {name: tuple(m.weight.shape) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert size.linear == {name: shape for name, shape in linear.items() if name != "lm_head"}


def test_auto_rank_stays_within_the_smallest_adapted_matrix():
    size = ModelSize(1_000_000, {"a.q_proj": (64, 64), "a.k_proj": (16, 64)})
    assert resolve_lora(LoraSettings(rank="auto"), size).rank == 16
    assert resolve_lora(LoraSettings(rank="auto", exclude_modules=("k_proj",)), size).rank == 32
    assert resolve_lora(LoraSettings(rank=4), size).rank == 4


def test_every_auto_is_resolved_and_named():
    config = tiny_config(*AUTO)
    resolved = resolve_auto(config)
    assert chosen(config, resolved) == {
        "lora.rank": 32,
        "sft_warmup.optimizer.learning_rate": 4.5e-4,  # two updates
        "lora_rl.optimizer.learning_rate": 1e-4,
    }
    assert (resolved.lora.rank, resolved.lora_rl.optimizer.learning_rate) == (32, 1e-4)
    assert chosen(resolved, resolve_auto(resolved)) == {}
    assert config.lora.rank == "auto"


@pytest.mark.parametrize(
    ("value", "says"),
    [('"big"', 'give a number or "auto"'), ("0", "greater than or equal to 1"), ("true", "valid integer")],
)
def test_other_words_are_refused(value: str, says: str):
    with pytest.raises(UserError, match=f"lora.rank: .*{says}"):
        tiny_config(f"lora.rank={value}")


ODD = [
    ("lora_rl.optimizer.learning_rate=5e-6", "lora_rl.optimizer.learning_rate = 5e-06 looks like a full fine-tuning"),
    ("sft_warmup.optimizer.learning_rate=5e-5", "sft_warmup.optimizer.learning_rate = 5e-05 looks like a full"),
    ("lora_rl.optimizer.learning_rate=0.002", "more than ten times"),
    ("lora.rank=4", "rank 4 is below 32, the least that verl advises"),
    ("lora.rank=600", "above 512, the most that vLLM serves"),
    ("lora.rank=256", r"rank 256 costs memory and time.*\(auto: 32\)"),
    ("lora.alpha=2", "alpha is 2 at rank 32, far from the 32"),
    ("lora={rank=64, alpha=512, rslora=true}", r"alpha \* sqrt\(rank\), with rsLoRA, is 4096 at rank 64"),
    ('lora_rl.mode="full"', "looks like a LoRA rate: full fine-tuning wants about a tenth"),
]


@pytest.mark.parametrize(("override", "says"), ODD)
def test_values_that_look_wrong_are_said_in_one_line(override: str, says: str):
    import re

    lines = warnings(tiny_config("lora.rank=32", override), 500_000_000)
    assert any(re.search(says, line) for line in lines), lines
    assert all("\n" not in line for line in lines)


def test_usual_values_are_not_remarked_on():
    assert (
        warnings(resolve_auto(tiny_config(*AUTO), ModelSize(7_600_000_000, {"q_proj": (4096, 4096)})), 7_600_000_000)
        == []
    )
    assert warnings(tiny_config("lora.rank=32"), 500_000_000) == []
    assert OptimizerSettings(learning_rate=1e-4).learning_rate == 1e-4
    toy = tiny_config("lora.rank=4", "lora_rl.optimizer.learning_rate=0.02")
    assert warnings(toy, 100_000) == []  # no rule is known to hold for a toy


def test_resolving_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from tests.tiny_run import tiny_config; from components.auto import resolve_auto; "
        f"resolve_auto(tiny_config(*{AUTO!r})); assert 'torch' not in sys.modules"
    )
    resolve_model("tiny://qwen2?seed=0")  # made by torch the first time
    subprocess.run([sys.executable, "-c", code], check=True)
