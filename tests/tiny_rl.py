"""Reinforcement learning on the tiny model with real parts, small enough for a test."""

from pathlib import Path

import torch

from components.lora_rl.training import CANARY_TOLERANCES
from tuneloop.data.chat import render_completion, render_prompt
from tuneloop.data.schema import Example
from tuneloop.models.load import load_model, load_tokenizer
from tuneloop.models.lora import attach, peft_config
from tuneloop.models.sources import resolve_model
from tuneloop.rewards.base import build_scorer
from tuneloop.rollout.shared_weights import SharedWeights
from tuneloop.rollout.torch_engine import TorchEngine
from tuneloop.rollout.weight_sync import Canary, WeightSync
from tuneloop.settings import LoraSettings, OptimizerSettings, RewardSettings
from tuneloop.training.policy import FullPolicy, Policy
from tuneloop.training.rl import RlTask, RlTrainer
from tuneloop.training.settings import RankScheduleSettings, RlSettings

BASE = "tiny://qwen2?seed=0"
CI_UPDATES = 6
EXAMPLES = [
    Example(id=str(n), messages=[{"role": "user", "content": f"{n}?"}], answer=str(n % 10), completion=str(n % 10))
    for n in range(40)
]


def warmed_up(settings: LoraSettings, dtype: str = "float32") -> Policy:
    """The tiny model with an adapter that changes what it says."""
    model = load_model(resolve_model(BASE), dtype, "cpu")
    layers = attach(model, settings, seed=5)
    generator = torch.Generator().manual_seed(6)
    for layer in layers.values():
        layer.B.data.copy_(torch.randn(layer.B.shape, generator=generator) * 0.02)
    return Policy(model, layers, peft_config(settings, layers, model, BASE), settings.init)


def rl_trainer(
    folder: Path, rank_schedule: dict | None = None, *, policy: Policy | None = None, **settings
) -> RlTrainer:
    """A trainer over the tiny model that continues what `folder` holds; every completion may be rewarded by chance."""
    policy = policy or warmed_up(LoraSettings(rank=4, alpha=8.0))
    tokenizer = load_tokenizer(resolve_model(BASE))
    values = {
        "mode": "full" if isinstance(policy, FullPolicy) else "lora",
        "updates": CI_UPDATES,
        "prompts_per_update": 8,
        "group_size": 4,
        "optimizer": OptimizerSettings(learning_rate=0.01),
        "rank_schedule": RankScheduleSettings(**(rank_schedule or {})),
        "validate_every": 3,
        "validation_prompts": 4,
        "checkpoint_every": 2,
    }
    scorer = build_scorer((RewardSettings(kind="format", pattern=r"(?s).*[aeiou].*"),))
    engine = TorchEngine.sharing(policy.model, tokenizer)
    canaries = [Canary(render_prompt(tokenizer, e.messages), render_completion(tokenizer, "7")) for e in EXAMPLES[:2]]
    tolerance = CANARY_TOLERANCES[str(policy.model.dtype).removeprefix("torch.")]
    if isinstance(policy, FullPolicy):
        sync: WeightSync = SharedWeights(engine, policy.model, canaries, tolerance)
    else:
        sync = WeightSync(engine, policy.model, policy.layers, policy.adapter_config, canaries, tolerance)
    task = RlTask(tokenizer, scorer, EXAMPLES[4:], EXAMPLES[:4], max_new_tokens=4)
    return RlTrainer(policy, sync, task, RlSettings(**{**values, **settings}), seed=3, folder=folder)
