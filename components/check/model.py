"""The base model as far as its files tell without loading it: architecture, linear layers, context, chat template."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.auto import resolve_auto, start_folder
from components.config import RunConfig
from tuneloop.errors import UserError
from tuneloop.models.recommend import ModelSize
from tuneloop.models.safetensors_header import TensorHeader, read_header
from tuneloop.models.sources import resolve_model, weight_files
from tuneloop.models.targets import choose_targets, linear_layers, match_pattern


@dataclass(frozen=True)
class BaseModel:
    """What the run's base model is.

    Attributes:
        tensors: tensor name -> header, over all files.
        targets: module name -> (out, in, rank) of every linear layer that gets an adapter.
        config: the run's config, every "auto" replaced.
    """

    folder: Path
    architecture: str
    tensors: dict[str, TensorHeader]
    targets: dict[str, tuple[int, int, int]]
    config: RunConfig

    @property
    def parameters(self) -> int:
        """Number of stored weights; a head tied to the embedding is stored, and counts, once."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def adapter_parameters(self) -> int:
        """R * (in + out) summed over the target modules."""
        return sum(rank * (rows + columns) for rows, columns, rank in self.targets.values())


def check_model(config: RunConfig) -> BaseModel:
    """Find the base model, and see that this run can train it.

    Raises:
        UserError: no such model, not a causal language model, quantised, a context that is too short, no chat
            template, target modules that match nothing, a rank above a matrix's smaller side.
        TryAgain: the model's store is unavailable.
    """
    uri = config.model.uri
    folder = resolve_model(uri)
    settings = _read_json(folder / "config.json", uri)
    architecture = (settings.get("architectures") or [""])[0]
    if not architecture.endswith("ForCausalLM"):
        named = architecture or "no architecture"
        raise UserError(
            f"model.uri {uri}: config.json names {named}, which is not a causal language model (…ForCausalLM)"
        )
    if settings.get("quantization_config"):
        raise UserError(f"model.uri {uri}: is quantised; name the original bfloat16 or float32 model")
    context = settings.get("max_position_embeddings")
    if context and config.model.max_length > context:
        raise UserError(
            f"model.max_length = {config.model.max_length} exceeds the {context} positions that {uri} was made for; "
            "lower it"
        )
    _check_tokenizer(folder, uri)
    if config.lora.start_from:
        start_folder(config)
    tensors: dict[str, TensorHeader] = {}
    for file in weight_files(folder, uri):
        tensors.update(read_header(file))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    size = ModelSize(sum(math.prod(shape) for shape in shapes.values()), linear_layers(shapes))
    resolved = resolve_auto(config, size)
    return BaseModel(folder, architecture, tensors, _targets(resolved, size.linear), resolved)


def _targets(config: RunConfig, linear: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int, int]]:
    targets = {}
    for name in choose_targets(linear, config.lora):
        rows, columns = linear[name]
        rank = match_pattern(config.lora.rank_pattern, name, config.lora.rank)
        if rank > min(rows, columns):
            raise UserError(
                f"lora.rank = {rank} exceeds {name}'s smaller side ({min(rows, columns)}): a rank above it adds "
                "nothing; lower lora.rank, or exclude the module with lora.exclude_modules"
            )
        targets[name] = (rows, columns, rank)
    return targets


def _check_tokenizer(folder: Path, uri: str) -> None:
    path = folder / "tokenizer_config.json"
    settings = _read_json(path, uri) if path.is_file() else {}
    templates = [folder / "chat_template.jinja", folder / "chat_template.json", folder / "additional_chat_templates"]
    if not settings.get("chat_template") and not any(template.exists() for template in templates):
        raise UserError(
            f"model.uri {uri}: the tokenizer has no chat template; use an instruct model or add chat_template.jinja"
        )


def _read_json(path: Path, uri: str) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.uri {uri}: {path.name} cannot be read as JSON ({error}); fetch the model again"
        ) from None
    if not isinstance(settings, dict):
        raise UserError(f"model.uri {uri}: {path.name} is no JSON object; fetch the model again")
    return settings
