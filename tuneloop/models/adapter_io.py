"""LoRA adapters on disk, in PEFT's own format, and the digest that names what an adapter computes."""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tuneloop.errors import UserError
from tuneloop.models.targets import match_pattern

PEFT_PREFIX = "base_model.model."
WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: factors a target module, and the settings that scale them.

    Attributes:
        factors: module name in the base model -> (A of shape (R, in), B of shape (out, R)).
        config: PEFT's `adapter_config.json` as a mapping.
    """

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    config: dict[str, Any]

    def scaling(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA, of one module (patterns honoured)."""
        alpha = match_pattern(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        rank = self.factors[module][0].shape[0]
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def digest(self) -> str:
        """sha256 (hex) over the factors and over every setting that changes what the adapter computes."""
        digest = hashlib.sha256()
        for module in sorted(self.factors):
            for name, tensor in zip("AB", self.factors[module], strict=True):
                tensor = tensor.detach().cpu().contiguous()
                digest.update(f"{module}.{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.view(torch.uint8).numpy().tobytes())
            digest.update(f"{self.scaling(module)!r}".encode())
        return digest.hexdigest()

    def is_no_op(self) -> bool:
        """Whether every B·A is zero, so that the adapter changes nothing."""
        return all(not a.any() or not b.any() for a, b in self.factors.values())


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, as `PeftModel.from_pretrained` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (a, b) in sorted(adapter.factors.items()):
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = b.detach().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter in PEFT's format.

    Raises:
        UserError: not an adapter folder, not LoRA, damaged, or with tensors that are not LoRA factors.
    """
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
        tensors = load_file(folder / WEIGHTS_NAME)
    except FileNotFoundError as error:
        raise UserError(f"{folder}: not an adapter folder ({Path(error.filename).name} is missing)") from None
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter is damaged ({error}); restore it or train again") from None
    if not isinstance(config, dict) or not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(
            f"{folder}: the adapter is damaged ({CONFIG_NAME} has no lora_alpha); restore it or train again"
        )
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: a {config.get('peft_type')} adapter; only LoRA is supported")
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(rf"(?:{re.escape(PEFT_PREFIX)})?(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if not found:
            raise UserError(f"{folder}: tensor {key!r} is not a LoRA factor of a linear layer")
        pairs.setdefault(found[1], {})[found[2]] = tensor
    incomplete = [module for module, pair in pairs.items() if len(pair) != 2]
    if incomplete or not pairs:
        raise UserError(f"{folder}: {incomplete[0] if incomplete else 'the adapter'} lacks its A or B factor")
    return Adapter({module: (pair["A"], pair["B"]) for module, pair in sorted(pairs.items())}, config)
