"""What lora_rl reads of the warm-up: the adapter that it continues, known to be the one that the config describes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.auto import announce, resolve_auto
from components.config import RunConfig
from tuneloop.errors import UserError
from tuneloop.models.recommend import ModelSize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tuneloop.models.adapter_io import Adapter
    from tuneloop.training.policy import Policy

# Of `[lora]`: what decides what the adapter is. The other settings only say where the warm-up began.
_ADAPTER_SETTINGS = (
    "rank", "alpha", "rslora", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
)  # fmt: skip


@dataclass(frozen=True)
class WarmUp:
    """A finished warm-up.

    Attributes:
        folder: the output of sft_warmup.
        adapter: what it left.
        config: the run's config with every "auto" as the warm-up resolved it.
    """

    folder: Path
    adapter: "Adapter"
    config: RunConfig

    @property
    def model(self) -> Path | None:
        """The fully fine-tuned model, if the warm-up left one."""
        return self.folder / "model" if (self.folder / "model").is_dir() else None

    def policy(self, model: "PreTrainedModel") -> "Policy":
        """What is trained of the warmed-up model: its adapter, or with `mode = "full"` every weight."""
        from tuneloop.models.lora import attach_adapter, describe_targets
        from tuneloop.training.policy import FullPolicy, Policy, absorb

        if self.config.lora_rl.mode == "full":
            absorb(model, self.adapter)
            policy = FullPolicy(model)
            print(f"every weight is trained: {sum(p.numel() for _, p in policy.parameters()):,} parameters", flush=True)
            return policy
        layers = attach_adapter(model, self.adapter, settings=self.config.lora)
        print(describe_targets(layers), flush=True)
        return Policy(model, layers, self.adapter.config, self.config.lora.init, self.adapter)


def read_warmup(config: RunConfig, folder: Path) -> WarmUp:
    """The warm-up in `folder`.

    Raises:
        UserError: it is damaged, or was made for another base or other settings of `[lora]`.
    """
    from tuneloop.models.adapter_io import load_adapter

    adapter = load_adapter(folder / "adapter")
    try:
        record: dict[str, Any] = json.loads((folder / "warmup.json").read_text())
        found = {"model.uri": record["base_uri"], **{f"lora.{key}": record["lora"][key] for key in _ADAPTER_SETTINGS}}
        parameters = int(record["parameters"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder}: holds no readable warmup.json; name the output of a finished sft_warmup") from None
    settings = config.lora.model_dump(mode="json")
    if settings["rank"] == "auto":
        settings["rank"] = found["lora.rank"]
    wanted = {"model.uri": config.model.uri, **{f"lora.{key}": settings[key] for key in _ADAPTER_SETTINGS}}
    for key, value in wanted.items():
        if found[key] != value:
            raise UserError(f"{folder}: was made with {key} = {found[key]!r}, but the config says {value!r}; "
                            "run sft_warmup again or change the config")  # fmt: skip
    known = config.model_copy(update={"lora": config.lora.model_copy(update={"rank": settings["rank"]})})
    resolved = resolve_auto(known, ModelSize(parameters, {}))
    announce("lora_rl", config, resolved, parameters, "lora_rl")
    return WarmUp(folder, adapter, resolved)
