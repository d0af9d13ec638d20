"""What vLLM's worker processes learn for merged sync: reload the base model with an adapter folded in."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from tuneloop.models.adapter_io import Adapter, load_adapter
from tuneloop.models.rounding import fold
from tuneloop.models.sources import weight_files

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # pyright: ignore[reportMissingImports]


class Merging:
    """Mixed into vLLM's worker class, so that `merge` can be called in each of its processes."""

    model_runner: "GPUModelRunner"

    def merge(self, folder: str) -> None:
        """Compute with base + the adapter of `folder` ("": the bare base) from now on.

        The base is read from its files each time: what was merged before cannot be left over.
        """
        runner: Any = self.model_runner
        config = runner.vllm_config.model_config
        adapter = load_adapter(Path(folder)) if folder else None
        weights = merged_weights(Path(config.model), adapter, config.dtype, runner.device)
        runner.reload_weights(weights_iterator=weights)


def merged_weights(
    model: Path, adapter: Adapter | None, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of the whole model, folded and rounded as the built-in engine and the published merge do.

    Raises:
        ValueError: the adapter changes a matrix that the files do not have.
    """
    left = set(adapter.factors) if adapter else set()
    for file in weight_files(model):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  no mapping
                weight, module = tensors.get_tensor(name), name.removesuffix(".weight")
                if adapter and module in left:
                    left.discard(module)
                    base = weight.to(device, dtype)
                    a, b = adapter.factors[module]
                    weight = torch.empty_like(base)
                    fold(base, a, b, adapter.scaling(module), weight)
                yield name, weight
    if left:
        raise ValueError(f"the model's files have no matrix named {sorted(left)[0]}")
