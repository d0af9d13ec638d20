"""Adapter merging: the candidate adapter in, a standalone model out, proven to say what base + adapter say."""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.config import RunConfig
from components.runner import Step, Summary
from tuneloop.errors import UserError

if TYPE_CHECKING:
    from tuneloop.models.merge import MergeResult
    from tuneloop.models.merge_probe import ProbeResult


def run(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Summary:
    """Fold the adapter into its base and compare the merged model with base + adapter on held-out prompts."""
    from tuneloop.models.adapter_io import load_adapter
    from tuneloop.models.merge import merge_adapter
    from tuneloop.models.merge_probe import probe_merge, require_close

    started = time.perf_counter()
    settings = config.merge_adapter
    training = _read_record(inputs["training"] / "rl.json", "lora_rl")
    data_card = _read_record(inputs["data"] / "data_card.json", "data_prep")
    base = _base_folder(config, training, inputs.get("warmup"))
    adapter, model = inputs["training"] / "adapter", output / "model"
    if load_adapter(adapter).digest() != training["adapter_digest"]:
        raise UserError(f"{adapter}: is not the adapter that rl.json names; restore it or train again")
    sequences = _probe_sequences(config, inputs["data"], data_card, base)
    merged = merge_adapter(base, adapter, model, max_shard_bytes=settings.max_shard_bytes, dtype=settings.dtype)
    probe = probe_merge(base, adapter, model, sequences)
    require_close(probe, settings.tolerance)
    _write_card(model, base, training, data_card, probe)
    record = {
        "base_uri": training["base_uri"],
        **dataclasses.asdict(merged),
        "probe": {**dataclasses.asdict(probe), "tolerance": settings.tolerance},
        "seconds": round(time.perf_counter() - started, 3),
    }
    (output / "merge.json").write_text(json.dumps(record, indent=2) + "\n")
    return _summary(merged, probe)


def _read_record(file: Path, step: str) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{file}: missing or damaged; name the output of a finished {step} step") from None


def _base_folder(config: RunConfig, training: dict[str, Any], warmup: Path | None) -> Path:
    """What the adapter was trained on: the fully fine-tuned warm-up when there is one, else the base model."""
    from tuneloop.models.sources import resolve_model

    if warmup is not None and (warmup / "model").is_dir():
        return warmup / "model"
    if config.sft_warmup.mode == "full" and config.sft_warmup.updates:
        raise UserError("sft_warmup.mode is full, so the adapter was trained on the warmed-up model: "
                        "give that step's output as --warmup")  # fmt: skip
    return resolve_model(training["base_uri"])


def _probe_sequences(config: RunConfig, data: Path, data_card: dict[str, Any], base: Path) -> list[list[int]]:
    """Held-out prompts with their reference completions, as tokens."""
    from tuneloop.data.chat import render_completion, render_prompt, require_chat_template
    from tuneloop.data.reader import read_examples
    from tuneloop.models.load import load_tokenizer

    split = next((name for name in ("validation", "test") if data_card["splits"].get(name)), None)
    if split is None:
        raise UserError(f"{data}: no held-out rows to prove the merge on; "
                        "raise data_prep.validation_share or data_prep.test_share")  # fmt: skip
    tokenizer = load_tokenizer(base)
    require_chat_template(tokenizer)
    examples = read_examples(data / f"{split}.parquet", config.merge_adapter.probe_prompts)
    sequences = [
        [*render_prompt(tokenizer, example.messages), *render_completion(tokenizer, example.completion)]
        for example in examples
    ]
    return [sequence[: config.model.max_length] for sequence in sequences]


def _write_card(
    model: Path, base: Path, training: dict[str, Any], data_card: dict[str, Any], probe: "ProbeResult"
) -> None:
    from tuneloop.models.model_card import ModelCard

    accuracy = training.get("validation_accuracy") or {}
    numbers = {
        "rows trained on": data_card["splits"]["train"],
        "updates": training["updates"],
        "validation accuracy before RL": accuracy.get("first"),
        "validation accuracy after RL": accuracy.get("last"),
        "mean KL to base + adapter (nats)": probe.mean_kl,
        "mean KL of base + adapter to the base (nats)": probe.adapter_kl,
        "top-1 agreement with base + adapter": probe.top1_agreement,
    }
    known = {name: value for name, value in numbers.items() if value is not None}
    ModelCard(training["base_uri"], training["adapter_digest"], data_card["fingerprint"], known).write(model, base)


def _summary(merged: "MergeResult", probe: "ProbeResult") -> Summary:
    return {
        "merged_modules": merged.merged_modules,
        "shards": merged.shards,
        "bytes": merged.bytes,
        "changed_share": merged.changed_share,
        "mean_kl": probe.mean_kl,
        "max_logprob_difference": probe.max_logprob_difference,
        "top1_agreement": probe.top1_agreement,
    }


STEP = Step(
    "merge_adapter",
    ("training", "data", "warmup"),
    run,
    sections=("model", "sft_warmup", "merge_adapter"),
    optional_inputs=("warmup",),
)
