"""LoRA reinforcement learning: prepared data and a warmed-up adapter in, the candidate adapter out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import RunConfig
from components.lora_rl.config import LoraRlConfig
from components.lora_rl.warmup import read_warmup
from components.runner import Step, Summary

if TYPE_CHECKING:
    from tuneloop.training.rl import RlResult

# Nats a token between two right computations: bfloat16 gives about 0.04, float32 about 1e-6.
CANARY_TOLERANCES = {"bfloat16": 0.1, "float32": 1e-3}
CANARIES = 16  # fixed prompts whose tokens trainer and engine must agree on after every sync


def run(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Summary:
    """Train the adapter by reinforcement learning from the task's rewards."""
    from tuneloop.data.chat import render_completion, render_prompt, require_chat_template
    from tuneloop.data.reader import read_examples
    from tuneloop.models.adapter_io import Adapter, save_adapter
    from tuneloop.models.load import load_model, load_tokenizer
    from tuneloop.models.sources import resolve_model
    from tuneloop.rewards.base import build_scorer
    from tuneloop.rollout.shared_weights import SharedWeights
    from tuneloop.rollout.torch_engine import TorchEngine
    from tuneloop.rollout.weight_sync import Canary, WeightSync
    from tuneloop.training.finish import save_full_model
    from tuneloop.training.rl import RlTask, RlTrainer

    warmup = read_warmup(config, inputs["warmup"])
    settings = warmup.config.lora_rl
    scorer = build_scorer(config.task.rewards)
    train = read_examples(inputs["data"] / "train.parquet")
    validation = read_examples(inputs["data"] / "validation.parquet", settings.validation_prompts)
    base = warmup.model or resolve_model(config.model.uri)
    tokenizer = load_tokenizer(base)
    require_chat_template(tokenizer)
    model = load_model(base, config.model.dtype)
    policy = warmup.policy(model)
    engine = TorchEngine.sharing(model, tokenizer, settings.engine.max_sequences)
    canaries = [
        Canary(render_prompt(tokenizer, example.messages), render_completion(tokenizer, example.completion))
        for example in validation[:CANARIES]
    ]
    tolerance = settings.engine.canary_tolerance or CANARY_TOLERANCES[config.model.dtype]
    sync: WeightSync
    if settings.mode == "full":
        sync = SharedWeights(engine, model, canaries, tolerance)
    else:
        sync = WeightSync(engine, model, policy.layers, policy.adapter_config, canaries, tolerance)
    task = RlTask(tokenizer, scorer, train, validation, config.task.max_new_tokens)
    result = RlTrainer(policy, sync, task, settings, seed=config.seed, folder=output).run()
    base_uri = str(base.resolve()) if warmup.model else config.model.uri
    if settings.mode == "full":
        save_full_model(model, base, output / "model")
    else:
        trained = policy.adapter()
        named = {**trained.config, "base_model_name_or_path": base_uri}
        save_adapter(Adapter(trained.factors, named), output / "adapter")
    return _record(result, settings, base_uri, output)


def _record(result: "RlResult", settings: LoraRlConfig, base_uri: str, output: Path) -> Summary:
    """Write `rl.json`; returns the step's summary."""
    first, last = result.first_accuracy, result.last_accuracy
    digest = "model_digest" if settings.mode == "full" else "adapter_digest"
    record = {
        "mode": settings.mode,
        "updates": result.updates,
        "learning_rate": settings.optimizer.learning_rate,
        digest: result.adapter_digest,
        "reference_digest": result.reference_digest,
        "validation_accuracy": {"first": first, "last": last},
        "base_uri": base_uri,
    }
    (output / "rl.json").write_text(json.dumps(record, indent=2) + "\n")
    return {
        "updates": result.updates,
        "validation_accuracy_first": first,
        "validation_accuracy_last": last,
        digest: result.adapter_digest,
    }


STEP = Step("lora_rl", ("data", "warmup"), run, sections=("model", "task", "lora", "lora_rl"), resumable=True)
