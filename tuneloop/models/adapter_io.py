"""LoRA adapters on disk, in PEFT's own format, and the digest that names what an adapter computes."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tuneloop.models import adapter_files
from tuneloop.models.adapter_files import CONFIG_NAME, PEFT_PREFIX, WEIGHTS_NAME, adapter_errors


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
        return adapter_files.scaling(self.config, module, self.factors[module][0].shape[0])

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
    with adapter_errors(folder):
        config = json.loads((folder / CONFIG_NAME).read_text())
        tensors = load_file(folder / WEIGHTS_NAME)
    adapter_files.check_config(config, folder)
    return Adapter(adapter_files.pair_factors(tensors, folder), config)
