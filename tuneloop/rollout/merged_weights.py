"""An adapter merged into copies of the matrices that it changes, and a model that computes with them.

On a CPU in bfloat16 a copy is laid out as oneDNN's kernels read it, and matrices that multiply the same input (queries,
keys and values; gate and up) are one. A decoding step has few rows, and would otherwise lay out every matrix anew,
which costs about as much as the multiplication.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from tuneloop.errors import UserError
from tuneloop.models.adapter_io import Adapter
from tuneloop.models.lora_linear import LoraLinear
from tuneloop.models.rounding import fold

_ROWS = 128  # for which oneDNN chooses a layout; others are about as fast with it


class MergedWeights:
    """The merged matrices of one adapter over a model, whose own weights stay as they are."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._copies: dict[tuple[str, ...], _Copy] = {}

    def __len__(self) -> int:
        """How many modules are merged."""
        return sum(map(len, self._copies))

    @torch.no_grad()
    def merge(self, adapter: Adapter | None) -> None:
        """Make the copies anew; None: there are none.

        Raises:
            UserError: the adapter was made for another model.
        """
        names = adapter.factors if adapter else {}
        groups = _groups(self.model, names)
        self._copies = {group: copy for group, copy in self._copies.items() if group in groups}
        for group in groups:
            linears = [_linear(self.model, name) for name in group]
            for name, linear in zip(group, linears, strict=True):
                a, b = names[name]
                if (b.shape[0], a.shape[1]) != tuple(linear.weight.shape):
                    raise UserError(f"the adapter was made for another base: {name} has another shape")
            earlier = self._copies.pop(group, None)
            # From zero: a matrix that were left as it was before would pass for the new one for many updates.
            merged = earlier.reused() if earlier else _zeros(linears)
            parts = merged.split([linear.out_features for linear in linears])
            for name, linear, part in zip(group, linears, parts, strict=True):
                fold(linear.weight, *names[name], adapter.scaling(name), part)  # type: ignore[union-attr]
            modules = [self.model.get_submodule(name) for name in group]
            self._copies[group] = (_LaidOut if _lays_out(linears[0].weight) else _Plain)(modules, linears, merged)

    def clear(self) -> None:
        """Forget them all."""
        self._copies = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model computes with the merged matrices instead of base + adapter; then everything is as before."""
        lora = [module for module in self.model.modules() if isinstance(module, LoraLinear)]
        was_enabled, was_training = [layer.enabled for layer in lora], self.model.training
        try:
            self.model.eval()
            for layer in lora:
                layer.enabled = False
            for copy in self._copies.values():
                copy.install()
            yield
        finally:
            for copy in self._copies.values():
                copy.remove()
            for layer, enabled in zip(lora, was_enabled, strict=True):
                layer.enabled = enabled
            self.model.train(was_training)


class _Copy(Protocol):
    """Merged matrices of modules that read the same input."""

    def reused(self) -> torch.Tensor:
        """Zeros of the matrices' shape to merge into, the copy's own memory where that can be."""
        ...

    def install(self) -> None:
        """Let the modules compute with them."""
        ...

    def remove(self) -> None:
        """Let the modules compute as before; also after an `install` that did not come to its end."""
        ...


class _Plain:
    """One matrix, put in the place of the module's weight."""

    def __init__(self, _: Sequence[nn.Module], linears: Sequence[nn.Linear], merged: torch.Tensor):
        [self.linear] = linears
        self.merged, self.original = merged, self.linear.weight.data

    def reused(self) -> torch.Tensor:
        return self.merged.zero_()

    def install(self) -> None:
        self.original = self.linear.weight.data
        self.linear.weight.data = self.merged

    def remove(self) -> None:
        self.linear.weight.data = self.original


class _LaidOut:
    """One or several matrices in oneDNN's layout, multiplied at once."""

    def __init__(self, modules: Sequence[nn.Module], linears: Sequence[nn.Linear], merged: torch.Tensor):
        self.modules, self.shape = modules, merged.shape
        self.sizes = [linear.out_features for linear in linears]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(merged, _ROWS)
        biases = [linear.bias.data for linear in linears if linear.bias is not None]
        self.bias = torch.cat(biases) if biases else None

    def reused(self) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=torch.bfloat16)

    def install(self) -> None:
        if len(self.modules) == 1:
            self.modules[0].__dict__["forward"] = self._product
            return
        for place, module in enumerate(self.modules):
            module.__dict__["forward"] = partial(self._one, place)
        self.modules[0].__dict__["products"] = self._products  # `lora_linear.project` looks here

    def remove(self) -> None:
        for module in self.modules:
            module.__dict__.pop("forward", None)
        self.modules[0].__dict__.pop("products", None)

    def _products(self, x: torch.Tensor) -> list[torch.Tensor]:
        return list(self._product(x).split(self.sizes, -1))

    def _one(self, place: int, x: torch.Tensor) -> torch.Tensor:
        return self._products(x)[place]

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _groups(model: PreTrainedModel, names: dict[str, tuple]) -> list[tuple[str, ...]]:
    """The adapted modules, those together that a fused layer multiplies with one input."""
    together = [
        tuple(f"{parent}.{child}" for child in children)
        for parent, module in model.named_modules()
        for children in getattr(module, "projected_together", ())
    ]
    groups = [
        group
        for group in together
        if all(name in names for name in group) and _lays_out(_linear(model, group[0]).weight) and _alike(model, group)
    ]
    grouped = {name for group in groups for name in group}
    return groups + [(name,) for name in names if name not in grouped]


def _alike(model: PreTrainedModel, group: tuple[str, ...]) -> bool:
    """Whether all of them have a bias, or none."""
    return len({_linear(model, name).bias is None for name in group}) == 1


def _zeros(linears: Sequence[nn.Linear]) -> torch.Tensor:
    rows = sum(linear.out_features for linear in linears)
    return linears[0].weight.new_zeros(rows, linears[0].in_features)


def _lays_out(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and _has_kernels()


@cache
def _has_kernels() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"the adapter was made for another base: the model has no module {name}") from None
    module = module.base if isinstance(module, LoraLinear) else module
    if not isinstance(module, nn.Linear):
        raise UserError(f"the adapter was made for another base: {name} is no linear layer")
    return module
