"""LoRA reinforcement learning: prepared data and a warmed-up adapter in, the candidate adapter out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import RunConfig
from components.runner import Step, Summary
from tuneloop.errors import UserError

if TYPE_CHECKING:
    from tuneloop.models.adapter_io import Adapter
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
    from tuneloop.models.lora import attach_adapter, describe_targets
    from tuneloop.models.sources import resolve_model
    from tuneloop.rewards.base import build_scorer
    from tuneloop.rollout.torch_engine import TorchEngine
    from tuneloop.rollout.weight_sync import Canary, WeightSync
    from tuneloop.training.policy import Policy
    from tuneloop.training.rl import RlTask, RlTrainer

    settings = config.lora_rl
    scorer = build_scorer(config.task.rewards)
    train = read_examples(inputs["data"] / "train.parquet")
    validation = read_examples(inputs["data"] / "validation.parquet", settings.validation_prompts)
    start = _start(config, inputs["warmup"])
    warmed_model = inputs["warmup"] / "model"
    base = warmed_model if warmed_model.is_dir() else resolve_model(config.model.uri)
    tokenizer = load_tokenizer(base)
    require_chat_template(tokenizer)
    model = load_model(base, config.model.dtype)
    layers = attach_adapter(model, start)
    print(describe_targets(layers), flush=True)
    policy = Policy(model, layers, start.config)
    engine = TorchEngine.sharing(model, tokenizer, settings.engine.max_sequences)
    canaries = [
        Canary(render_prompt(tokenizer, example.messages), render_completion(tokenizer, example.completion))
        for example in validation[:CANARIES]
    ]
    tolerance = settings.engine.canary_tolerance or CANARY_TOLERANCES[config.model.dtype]
    sync = WeightSync(engine, model, layers, start.config, canaries, tolerance)
    task = RlTask(tokenizer, scorer, train, validation, config.task.max_new_tokens)
    result = RlTrainer(policy, sync, task, settings, seed=config.seed, folder=output).run()
    base_uri = str(base.resolve()) if base == warmed_model else config.model.uri
    trained = policy.adapter()
    save_adapter(Adapter(trained.factors, {**trained.config, "base_model_name_or_path": base_uri}), output / "adapter")
    return _record(result, base_uri, output)


def _start(config: RunConfig, warmup: Path) -> "Adapter":
    """The warm-up's adapter, known to be what the config describes.

    Raises:
        UserError: it is damaged, or was made for another base, rank or alpha.
    """
    from tuneloop.models.adapter_io import load_adapter

    adapter = load_adapter(warmup / "adapter")
    try:
        base_uri = json.loads((warmup / "warmup.json").read_text())["base_uri"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{warmup}: holds no readable warmup.json; name the output of a finished sft_warmup") from None
    wanted = {"model.uri": config.model.uri, "lora.rank": config.lora.rank, "lora.alpha": config.lora.alpha}
    found = {"model.uri": base_uri, "lora.rank": adapter.config.get("r"), "lora.alpha": adapter.config["lora_alpha"]}
    for key, value in wanted.items():
        if found[key] != value:
            raise UserError(f"{warmup}: was made with {key} = {found[key]!r}, but the config says {value!r}; "
                            "run sft_warmup again or change the config")  # fmt: skip
    return adapter


def _record(result: "RlResult", base_uri: str, output: Path) -> Summary:
    """Write `rl.json`; returns the step's summary."""
    first, last = result.first_accuracy, result.last_accuracy
    record = {
        "updates": result.updates,
        "adapter_digest": result.adapter_digest,
        "reference_digest": result.reference_digest,
        "validation_accuracy": {"first": first, "last": last},
        "base_uri": base_uri,
    }
    (output / "rl.json").write_text(json.dumps(record, indent=2) + "\n")
    return {
        "updates": result.updates,
        "validation_accuracy_first": first,
        "validation_accuracy_last": last,
        "adapter_digest": result.adapter_digest,
    }


STEP = Step("lora_rl", ("data", "warmup"), run, sections=("model", "task", "lora", "lora_rl"), resumable=True)
