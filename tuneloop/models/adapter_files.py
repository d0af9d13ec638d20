"""What an adapter's files say, in PEFT's own format, and the digest that names it. Does not import torch."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tuneloop.errors import UserError
from tuneloop.models.targets import match_pattern

PEFT_PREFIX = "base_model.model."
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"

_TORCH_NAMES = {"F64": "torch.float64", "F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}
Tensor = TypeVar("Tensor")


def scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA, of one module (patterns honoured)."""
    alpha = match_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def file_digest(folder: Path) -> str:
    """`Adapter.digest` of an adapter on disk: sha256 (hex) over the factors and every setting that changes them.

    Raises:
        UserError: see `load_adapter`.
    """
    from safetensors import deserialize

    with adapter_errors(folder):
        config = json.loads((folder / CONFIG_NAME).read_text())
        tensors = dict(deserialize((folder / WEIGHTS_NAME).read_bytes()))
    check_config(config, folder)
    digest = hashlib.sha256()
    for module, pair in pair_factors(tensors, folder).items():
        for name, tensor in zip("AB", pair, strict=True):
            dtype = _TORCH_NAMES.get(tensor["dtype"])
            if dtype is None:
                raise UserError(f"{folder}: {module}: factors of type {tensor['dtype']} are no LoRA factors")
            digest.update(f"{module}.{name} {dtype} {tuple(tensor['shape'])} ".encode())
            digest.update(tensor["data"])
        digest.update(f"{scaling(config, module, pair[0]['shape'][0])!r}".encode())
    return digest.hexdigest()


@contextmanager
def adapter_errors(folder: Path) -> Iterator[None]:
    """Reading an adapter's files: what is wrong with them becomes one line."""
    from safetensors import SafetensorError

    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not an adapter folder ({Path(error.filename).name} is missing)") from None
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter is damaged ({error}); restore it or train again") from None


def check_config(config: Any, folder: Path) -> None:
    """See that `adapter_config.json` describes a LoRA adapter.

    Raises:
        UserError: it does not.
    """
    if not isinstance(config, dict) or not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(
            f"{folder}: the adapter is damaged ({CONFIG_NAME} has no lora_alpha); restore it or train again"
        )
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: a {config.get('peft_type')} adapter; only LoRA is supported")


def pair_factors(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """PEFT's tensor names as modules, sorted: module -> (A, B).

    Raises:
        UserError: a tensor is no LoRA factor, or lacks its other one.
    """
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"(?:{re.escape(PEFT_PREFIX)})?(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if not found:
            raise UserError(f"{folder}: tensor {key!r} is not a LoRA factor of a linear layer")
        pairs.setdefault(found[1], {})[found[2]] = tensor
    incomplete = [module for module, pair in pairs.items() if len(pair) != 2]
    if incomplete or not pairs:
        raise UserError(f"{folder}: {incomplete[0] if incomplete else 'the adapter'} lacks its A or B factor")
    return {module: (pair["A"], pair["B"]) for module, pair in sorted(pairs.items())}
