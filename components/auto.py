"""Settings that say "auto", resolved from the model's files: the same in every step. Does not import torch."""

from pathlib import Path

from components.config import RunConfig
from tuneloop.errors import UserError
from tuneloop.models.adapter_source import adapter_rank, resolve_adapter
from tuneloop.models.recommend import (
    Method,
    Mode,
    ModelSize,
    rank_warnings,
    rate_warnings,
    read_model_size,
    resolve_lora,
    resolve_optimizer,
)
from tuneloop.models.sources import resolve_model


def resolve_auto(config: RunConfig, size: ModelSize | None = None) -> RunConfig:
    """The config with every "auto" replaced by a number.

    Args:
        size: of the base model; None: read from its files.

    Raises:
        UserError: the model or `lora.start_from` cannot be found, or no module matches.
        TryAgain: a store is unavailable.
    """
    size = size or read_model_size(resolve_model(config.model.uri))
    lora = config.lora
    if lora.rank == "auto" and lora.start_from:
        lora = lora.model_copy(update={"rank": adapter_rank(start_folder(config))})
    resolved = config.model_copy(update={"lora": resolve_lora(lora, size)})
    for section, method, mode, updates in _runs(config):
        settings = getattr(config, section)
        optimizer = resolve_optimizer(settings.optimizer, size.parameters, method, mode, updates)
        resolved = resolved.model_copy(update={section: settings.model_copy(update={"optimizer": optimizer})})
    return resolved


def chosen(config: RunConfig, resolved: RunConfig) -> dict[str, float]:
    """What `resolve_auto` put in: setting -> number."""
    found: dict[str, float] = {}
    if config.lora.rank == "auto":
        found["lora.rank"] = resolved.lora.rank
    for section, *_ in _runs(config):
        if getattr(config, section).optimizer.learning_rate == "auto":
            found[f"{section}.optimizer.learning_rate"] = getattr(resolved, section).optimizer.learning_rate
    return found


def warnings(resolved: RunConfig, parameters: int, sections: tuple[str, ...] = ("sft_warmup", "lora_rl")) -> list[str]:
    """One line for each rank, alpha or learning rate that looks wrong for a model of this many parameters."""
    runs = [run for run in _runs(resolved) if run[0] in sections]
    with_adapter = any(mode == "lora" for _, _, mode, _ in runs)
    lines = rank_warnings(resolved.lora, parameters) if with_adapter else []
    for section, method, mode, updates in runs:
        if updates:
            optimizer = getattr(resolved, section).optimizer
            lines += rate_warnings(f"{section}.optimizer", optimizer, parameters, method, mode, updates)
    return lines


def announce(step: str, config: RunConfig, resolved: RunConfig, parameters: int, *sections: str) -> None:
    """Print what was chosen for these sections, and what looks wrong in them."""
    for key, value in chosen(config, resolved).items():
        if key.startswith(("lora.", *sections)):
            print(f'{step}: {key} = "auto" is {value:g} for {parameters:,} parameters', flush=True)
    for line in warnings(resolved, parameters, sections):
        print(f"{step}: warning: {line}", flush=True)


def start_folder(config: RunConfig) -> Path:
    """The folder of the adapter that `lora.start_from` names.

    Raises:
        UserError: nothing there, no adapter, or one for another base.
        TryAgain: the store is unavailable.
    """
    if config.sft_warmup.mode == "full":
        raise UserError('lora.start_from continues an adapter, but sft_warmup.mode = "full" trains the weights below '
                        'it: set the mode to "lora", or leave start_from out')  # fmt: skip
    place = config.promote
    return resolve_adapter(
        config.lora.start_from,
        registry=place.registry,
        adapter_name=place.adapter_name,
        base_uri=config.model.uri,
    )


def _runs(config: RunConfig) -> list[tuple[str, Method, Mode, int]]:
    """(section, method, mode, updates) of the training steps."""
    sft, rl = config.sft_warmup, config.lora_rl
    return [("sft_warmup", "sft", sft.mode, sft.updates), ("lora_rl", "rl", rl.mode, rl.updates)]
