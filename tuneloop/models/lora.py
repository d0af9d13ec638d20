"""LoRA layers: which modules get one, and how they become a PEFT adapter and back.

The base weight stays frozen; the factors are held in the model's dtype for computing, and the optimiser keeps fp32
master copies of its own.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tuneloop.errors import UserError
from tuneloop.models.adapter_io import Adapter
from tuneloop.models.lora_init import initial_a
from tuneloop.models.lora_linear import LoraLinear
from tuneloop.models.sharding import whole
from tuneloop.models.targets import choose_targets, match_pattern
from tuneloop.settings import LoraSettings


def target_modules(model: nn.Module, settings: LoraSettings) -> dict[str, nn.Linear]:
    """The linear layers that get an adapter, by name; never the output head. See `choose_targets` for the rule.

    Raises:
        UserError: nothing matches, or a pattern of the list matches nothing.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear = {name: module for name, module in linear.items() if module is not head}
    return {name: linear[name] for name in choose_targets(linear, settings)}


def module_scaling(settings: LoraSettings, module: str, rank: int) -> float:
    """What B·A is multiplied with in a module of this rank: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
    alpha = match_pattern(settings.alpha_pattern, module, settings.alpha)
    return alpha / math.sqrt(rank) if settings.rslora else alpha / rank


def attach(model: PreTrainedModel, settings: LoraSettings, seed: int) -> dict[str, LoraLinear]:
    """Give every target module a fresh adapter (A by `settings.init` from the seed, B zero), in place.

    Raises:
        UserError: no module matches, or a rank exceeds a matrix's smaller side.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, LoraLinear] = {}
    for name, linear in target_modules(model, settings).items():
        rank = match_pattern(settings.rank_pattern, name, settings.rank)
        _refuse_excess_rank(name, rank, linear)
        layer = LoraLinear(linear, rank, module_scaling(settings, name, rank), settings.dropout)
        layer.A.data.copy_(initial_a(settings.init, linear.weight, rank, generator))
        _replace(model, name, layer)
        layers[name] = layer
    return layers


def attach_adapter(
    model: PreTrainedModel, adapter: Adapter, dropout: float = 0.0, settings: LoraSettings | None = None
) -> dict[str, LoraLinear]:
    """Continue from an existing adapter, in place.

    Args:
        settings: whose alpha scales the layers; B takes up the difference, so that the function is the adapter's. None:
            the adapter's own scaling.

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
        held = adapter.scaling(name)
        scaling = module_scaling(settings, name, a.shape[0]) if settings else held
        layer = LoraLinear(linear, a.shape[0], scaling, dropout)
        layer.A.data.copy_(a)
        layer.B.data.copy_(b if scaling == held else b.float() * (held / scaling))
        _replace(model, name, layer)
        layers[name] = layer
    return layers


def require_fit(model: PreTrainedModel, adapter: Adapter, settings: LoraSettings, *, any_rank: bool) -> None:
    """See that an existing adapter is of the modules and ranks that the settings describe.

    Args:
        any_rank: only modules of `rank_pattern` must have the rank of the settings.

    Raises:
        UserError: it is not.
    """
    wanted, found = set(target_modules(model, settings)), set(adapter.factors)
    if wanted != found:
        name = sorted(wanted ^ found)[0]
        has = "lacks" if name in wanted else "has"
        raise UserError(f"lora.start_from {settings.start_from}: the adapter {has} {name}, which lora.target_modules "
                        f"{'names' if name in wanted else 'leaves out'}; change one of the two")  # fmt: skip
    for name, (a, _) in adapter.factors.items():
        rank = match_pattern(settings.rank_pattern, name, None if any_rank else settings.rank)
        if rank not in (None, a.shape[0]):
            raise UserError(f"lora.start_from {settings.start_from}: the adapter has rank {a.shape[0]} at {name}, but "
                            f'the config says {rank}; set lora.rank = "auto" to take the adapter\'s')  # fmt: skip


def install(model: PreTrainedModel, layers: dict[str, LoraLinear]) -> None:
    """Put these layers into the model, in place of whatever adapter layers it has; their base weights are its own."""
    for name, module in [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLinear)]:
        if name not in layers:
            _replace(model, name, module.base)
    for name, layer in layers.items():
        _replace(model, name, layer)


def extract(layers: dict[str, LoraLinear], config: dict, *, layered: bool = True) -> Adapter:
    """A copy of the layers' factors as an adapter that PEFT and vLLM compute alike.

    vLLM multiplies every module with the config's one lora_alpha / r, PEFT with its own alpha over its own rank. So all
    modules are given one scaling, that of most of them; where a module was trained with another one, B takes up the
    ratio: exactly when it is a power of two, else in fp32. Where ranks differ, r is the largest, and the patterns say
    each module's rank with the alpha that keeps the scaling.

    Args:
        config: `peft_config`; what it says of rank and alpha is replaced by what the layers have.
        layered: put factors that are spread over processes together a module at a time, not all at once.
    """
    counts = Counter(layer.scaling for layer in layers.values())
    common = max(counts, key=lambda scaling: (counts[scaling], -scaling))
    factors = {}
    for names in [[name] for name in layers] if layered else [list(layers)]:
        with whole([factor for name in names for factor in (layers[name].A, layers[name].B)]):
            for name in names:
                layer = layers[name]
                factors[name] = layer.A.detach().clone(), _folded(layer.B.detach(), layer.scaling / common)
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    return Adapter(factors, {**config, **_rank_settings(ranks, common, bool(config.get("use_rslora")))})


def _folded(b: torch.Tensor, ratio: float) -> torch.Tensor:
    exact = math.frexp(ratio)[0] == 0.5  # a power of two
    return b.clone() if ratio == 1.0 else b * ratio if exact else b.float() * ratio


def _rank_settings(ranks: dict[str, int], scaling: float, rslora: bool) -> dict:
    rank = max(ranks.values())
    same = all(other == rank for other in ranks.values())
    rslora = rslora and same  # PEFT advises against it beside patterns
    alphas = {name: _alpha(scaling, other) for name, other in ranks.items()}
    return {
        "r": rank,
        "lora_alpha": _alpha(scaling, math.sqrt(rank) if rslora else rank),
        "use_rslora": rslora,
        "rank_pattern": {} if same else _pattern(ranks, rank),
        "alpha_pattern": {} if same else _pattern(alphas, _alpha(scaling, rank)),
    }


def _alpha(scaling: float, divisor: float) -> float:
    """The alpha that gives exactly this scaling when it is divided, the roundest one if there are several."""
    alpha = scaling * divisor
    neighbours = (round(alpha, 6), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0.0))
    return next((candidate for candidate in neighbours if candidate / divisor == scaling), alpha)


def _pattern(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Values by leaf name where all modules of that name agree, else by full name; the default is left out."""
    kinds: dict[str, set] = {}
    for name, value in values.items():
        kinds.setdefault(name.rsplit(".", 1)[-1], set()).add(value)
    pattern = {}
    for name, value in values.items():
        leaf = name.rsplit(".", 1)[-1]
        if value != default:
            pattern[leaf if len(kinds[leaf]) == 1 else name] = value
    return pattern


def peft_config(settings: LoraSettings, layers: dict[str, LoraLinear], model: nn.Module, base_uri: str) -> dict:
    """What an `adapter_config.json` says of everything but rank and alpha, which `extract` adds."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_uri,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _target_names(layers, model),
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
