"""LoRA layers: which modules get one, how they compute, and how they become a PEFT adapter and back.

The base weight stays frozen; the factors are held in the model's dtype for computing, and the optimiser keeps fp32
master copies of its own. Formula: y = W x + scaling * B (A x), Hu et al., 2021 (arXiv:2106.09685).

Legend: R rank.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from tuneloop.errors import UserError
from tuneloop.models.adapter_io import Adapter
from tuneloop.models.targets import choose_targets, match_pattern
from tuneloop.settings import LoraSettings


class LoraLinear(nn.Module):
    """A frozen linear layer and its trainable low-rank update.

    `enabled = False` computes with the base weight alone.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.scaling, self.dropout, self.enabled = scaling, dropout, True
        self.A = nn.Parameter(torch.empty(rank, base.in_features, dtype=base.weight.dtype, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=base.weight.dtype, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self.base(x)
        if self.dropout and self.training:
            return self.base(x) + self.scaling * F.linear(F.linear(F.dropout(x, self.dropout), self.A), self.B)
        y = _LoraMatmul.apply(x, self.base.weight, self.A, self.B, self.scaling)
        return y if self.base.bias is None else y + self.base.bias


class _LoraMatmul(torch.autograd.Function):
    """x W^T + s (x A^T) B^T, accumulated in place, so that no full-size temporary is made in either direction."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scaling):
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ a.T
        y = rows @ weight.T
        y.addmm_(low, b.T, alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        x, weight, a, b, low = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        gradient = gradient.reshape(-1, weight.shape[0])
        gradient_low = (gradient @ b).mul_(ctx.scaling)
        gradient_b = (gradient.T @ low).mul_(ctx.scaling)
        gradient_a = gradient_low.T @ rows
        gradient_x = gradient_w = None
        if ctx.needs_input_grad[0]:
            gradient_x = gradient @ weight
            gradient_x.addmm_(gradient_low, a)
            gradient_x = gradient_x.view(x.shape)
        if ctx.needs_input_grad[1]:
            gradient_w = gradient.T @ rows
        return gradient_x, gradient_w, gradient_a, gradient_b, None


def target_modules(model: nn.Module, settings: LoraSettings) -> dict[str, nn.Linear]:
    """The linear layers that get an adapter, by name; never the output head. See `choose_targets` for the rule.

    Raises:
        UserError: nothing matches, or a pattern of the list matches nothing.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear = {name: module for name, module in linear.items() if module is not head}
    return {name: linear[name] for name in choose_targets(linear, settings)}


def attach(model: PreTrainedModel, settings: LoraSettings, seed: int) -> dict[str, LoraLinear]:
    """Give every target module a fresh adapter (A Kaiming-uniform from the seed, B zero), in place.

    Raises:
        UserError: no module matches, or a rank exceeds a matrix's smaller side.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, LoraLinear] = {}
    for name, linear in target_modules(model, settings).items():
        rank = match_pattern(settings.rank_pattern, name, settings.rank)
        alpha = match_pattern(settings.alpha_pattern, name, settings.alpha)
        _refuse_excess_rank(name, rank, linear)
        layer = LoraLinear(linear, rank, alpha / math.sqrt(rank) if settings.rslora else alpha / rank, settings.dropout)
        bound = 1.0 / math.sqrt(linear.in_features)  # kaiming_uniform_(a=sqrt(5)), as PEFT and nn.Linear do
        values = torch.rand(layer.A.shape, generator=generator).mul_(2 * bound).sub_(bound)
        layer.A.data.copy_(values)
        _replace(model, name, layer)
        layers[name] = layer
    return layers


def attach_adapter(model: PreTrainedModel, adapter: Adapter, dropout: float = 0.0) -> dict[str, LoraLinear]:
    """Continue from an existing adapter, in place.

    Raises:
        UserError: the adapter was made for another model.
    """
    layers: dict[str, LoraLinear] = {}
    modules = dict(model.named_modules())
    for name, (a, b) in adapter.factors.items():
        linear = modules.get(name)
        fits = isinstance(linear, nn.Linear) and (b.shape[0], a.shape[1]) == tuple(linear.weight.shape)
        if not isinstance(linear, nn.Linear) or not fits:
            what = f"has no linear layer {name}" if linear is None else f"has another shape at {name}"
            raise UserError(f"the adapter was made for another base: the model {what}")
        layer = LoraLinear(linear, a.shape[0], adapter.scaling(name), dropout)
        layer.A.data.copy_(a)
        layer.B.data.copy_(b)
        _replace(model, name, layer)
        layers[name] = layer
    return layers


def install(model: PreTrainedModel, layers: dict[str, LoraLinear]) -> None:
    """Put these layers into the model, in place of whatever adapter layers it has; their base weights are its own."""
    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]:
        if name not in layers:
            _replace(model, name, module.base)
    for name, layer in layers.items():
        _replace(model, name, layer)


def extract(layers: dict[str, LoraLinear], config: dict) -> Adapter:
    """A copy of the layers' factors as an adapter."""
    factors = {name: (layer.A.detach().clone(), layer.B.detach().clone()) for name, layer in layers.items()}
    return Adapter(factors, config)


def peft_config(settings: LoraSettings, layers: dict[str, LoraLinear], model: nn.Module, base_uri: str) -> dict:
    """The `adapter_config.json` from which PEFT computes what we trained.

    vLLM reads it too, but applies one alpha and one rank to all modules: patterns are for PEFT and merging only.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_uri,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _target_names(layers, model),
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
    }


def trainable_parameters(layers: dict[str, LoraLinear]) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, factor) of every adapter parameter, in a stable order."""
    for name, layer in layers.items():
        yield f"{name}.lora_A", layer.A
        yield f"{name}.lora_B", layer.B


def describe_targets(layers: dict[str, LoraLinear]) -> str:
    """A small table of what was matched: leaf name, how many, shape, rank, parameters."""
    kinds: dict[tuple, int] = {}
    for name, layer in layers.items():
        shape = (layer.base.out_features, layer.base.in_features)
        key = (name.rsplit(".", 1)[-1], *shape, layer.A.shape[0])
        kinds[key] = kinds.get(key, 0) + 1
    total = sum(layer.A.numel() + layer.B.numel() for layer in layers.values())
    rows = [
        f"  {leaf:<14} {count:>4} x {out} x {into}, rank {rank}" for (leaf, out, into, rank), count in kinds.items()
    ]
    return "\n".join([f"adapter: {len(layers)} modules, {total:,} parameters", *rows])


def _target_names(layers: dict[str, LoraLinear], model: nn.Module) -> list[str]:
    """Leaf names when they say exactly which modules are adapted; full names otherwise."""
    leaves = {name.rsplit(".", 1)[-1] for name in layers}
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not name.endswith(".base")
    ]
    ambiguous = any(name.rsplit(".", 1)[-1] in leaves for name in others)
    return sorted(layers) if ambiguous else sorted(leaves)


def _refuse_excess_rank(name: str, rank: int, linear: nn.Linear) -> None:
    limit = min(linear.in_features, linear.out_features)
    if rank > limit:
        raise UserError(f"lora.rank = {rank} exceeds {name}'s smaller side ({limit}): a rank above it adds nothing")


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
