"""Supervised warm-up: prepared data in, the adapter from which RL continues out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from components.auto import announce, resolve_auto, start_folder
from components.config import RunConfig
from components.runner import Step, Summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tuneloop.models.lora_linear import LoraLinear


def run(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Summary:
    """Warm the model up on prepared completions and write the adapter that RL starts from."""
    from tuneloop.data.chat import require_chat_template
    from tuneloop.data.reader import read_examples
    from tuneloop.memory import keep_freed_memory
    from tuneloop.models.adapter_io import save_adapter
    from tuneloop.models.load import checkpoint_layers, load_model, load_tokenizer, reserve_model
    from tuneloop.models.lora import attach, describe_targets, extract, peft_config
    from tuneloop.models.recommend import read_model_size
    from tuneloop.models.sources import resolve_model
    from tuneloop.training.finish import save_full_model
    from tuneloop.training.sft import warm_up

    start = start_folder(config) if config.lora.start_from else None
    base = resolve_model(config.model.uri)
    size = read_model_size(base)
    resolved = resolve_auto(config, size)
    announce("sft_warmup", config, resolved, size.parameters, "sft_warmup")
    settings, lora = resolved.sft_warmup, resolved.lora
    train = read_examples(inputs["data"] / "train.parquet")
    validation = read_examples(inputs["data"] / "validation.parquet", settings.validation_examples)
    tokenizer = load_tokenizer(base)
    require_chat_template(tokenizer)
    keep_freed_memory()
    # Nothing is computed to hand on an adapter as it is, so a model that no device here holds can be started from too.
    reads_weights = settings.updates > 0 or settings.mode == "full" or lora.init == "svd"
    model = (load_model if reads_weights else reserve_model)(base, config.model.dtype)
    if config.sft_warmup.gradient_checkpointing:
        checkpoint_layers(model)
    # After a full fine-tuning the adapter is a fresh one over the new weights, so it is attached afterwards.
    layers = {} if settings.mode == "full" else _layers(config, resolved, model, start)
    if layers:
        print(describe_targets(layers), flush=True)
    losses: tuple[float | None, float | None] = (None, None)
    if reads_weights:
        result = warm_up(model, layers, tokenizer, train, validation, settings, seed=config.seed, folder=output)
        losses = result.first_loss, result.last_loss
    base_uri = config.model.uri
    if settings.mode == "full":
        save_full_model(model, base, output / "model")
        base_uri = "sft_warmup/model"
        layers = attach(model, lora, config.seed)
    adapter = extract(layers, peft_config(lora, layers, model, base_uri))
    save_adapter(adapter, output / "adapter")
    warmup = {
        "mode": settings.mode,
        "base_uri": config.model.uri,
        "parameters": size.parameters,
        "lora": lora.model_dump(mode="json"),
        "learning_rate": settings.optimizer.learning_rate,
        "updates": settings.updates,
        "adapter_digest": adapter.digest(),
        "validation_loss": {"first": losses[0], "last": losses[1]},
    }
    (output / "warmup.json").write_text(json.dumps(warmup, indent=2) + "\n")
    return {
        "updates": settings.updates,
        "validation_loss_first": losses[0],
        "validation_loss_last": losses[1],
        "adapter_digest": adapter.digest(),
    }


def _layers(
    config: RunConfig, resolved: RunConfig, model: "PreTrainedModel", start: Path | None
) -> "dict[str, LoraLinear]":
    """A fresh adapter, or the one in the folder `start`."""
    from tuneloop.models.adapter_io import load_adapter
    from tuneloop.models.lora import attach, attach_adapter, require_fit

    lora = resolved.lora
    if start is None:
        return attach(model, lora, config.seed)
    adapter = load_adapter(start)
    require_fit(model, adapter, lora, any_rank=config.lora.rank == "auto")
    print(f"sft_warmup: continues adapter {adapter.digest()[:12]} of {lora.start_from}", flush=True)
    return attach_adapter(model, adapter, lora.dropout, lora)


STEP = Step(
    "sft_warmup",
    ("data",),
    run,
    sections=("model", "lora", "sft_warmup"),
    resumable=True,
    indifferent=("sft_warmup.gradient_checkpointing", "sft_warmup.stop_grace_seconds"),
)
