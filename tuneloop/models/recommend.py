"""LoRA rank and learning rate by the size of the model and the method, and warnings about values that look wrong.

Rank: 32 up to 0.5 billion parameters, 128 from 32 billion on (verl's guidance), in between the power of two nearest to
32 * (N / 0.5e9)^(1/3). Learning rate of full fine-tuning: falls with a power of N between the same sizes, from 3e-5 to
1e-5 in the warm-up and from 1e-5 to 3e-6 in RL (where verl's 72B example stands: 3e-5 with LoRA). LoRA takes ten times
as much (Schulman et al., LoRA Without Regret, 2025), whatever the rank, as long as alpha stays near 32. The same source
finds about fifteen times best in runs of under about a hundred updates; the warm-up follows that, RL does not: there a
rate that is too high costs the policy, and one that is too low only time.

Everything follows from the headers of the model's files; this module does not import torch.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tuneloop.models.safetensors_header import read_header
from tuneloop.models.sources import weight_files
from tuneloop.models.targets import choose_targets, linear_layers
from tuneloop.settings import LoraSettings, OptimizerSettings

Method = Literal["sft", "rl"]
Mode = Literal["lora", "full"]

SMALL, LARGE = 0.5e9, 32e9  # parameters; the rules are constant outside
RANKS = (32, 128)
FULL_RATES: dict[Method, tuple[float, float]] = {"sft": (3e-5, 1e-5), "rl": (1e-5, 3e-6)}
LORA_FACTOR, SHORT_FACTOR, SHORT_UPDATES = 10.0, 15.0, 100
REFERENCE_ALPHA = 32.0  # the scaling times the rank that the rates hold for
TOY = 50e6  # parameters under which no rule of thumb is known to hold, so no rate is called wrong


@dataclass(frozen=True)
class ModelSize:
    """What the rules look at.

    Attributes:
        parameters: stored weights; a head tied to the embedding counts once.
        linear: module name -> (out, in) of the linear layers, without embeddings and head.
    """

    parameters: int
    linear: dict[str, tuple[int, int]]


def read_model_size(folder: Path) -> ModelSize:
    """The size of a model, from the headers of its files.

    Raises:
        UserError: a file is missing or damaged.
    """
    shapes = {name: header.shape for file in weight_files(folder) for name, header in read_header(file).items()}
    return ModelSize(sum(math.prod(shape) for shape in shapes.values()), linear_layers(shapes))


def recommend_rank(parameters: int) -> int:
    """A power of two between 32 and 128, by the model's parameters."""
    return 2 ** round(math.log2(_between(parameters, *RANKS)))


def recommend_learning_rate(
    parameters: int, method: Method, mode: Mode = "lora", updates: int = SHORT_UPDATES
) -> float:
    """The learning rate, two significant digits, by the model's parameters, method, mode and length of the run."""
    full = _between(parameters, *FULL_RATES[method])
    short = method == "sft" and updates < SHORT_UPDATES
    factor = 1.0 if mode == "full" else SHORT_FACTOR if short else LORA_FACTOR
    return float(f"{full * factor:.2g}")


def _between(parameters: int, small: float, large: float) -> float:
    """`small` up to SMALL parameters, `large` from LARGE on, a power law in between."""
    share = math.log(max(parameters, 1) / SMALL) / math.log(LARGE / SMALL)
    return small * (large / small) ** min(1.0, max(0.0, share))


def resolve_lora(settings: LoraSettings, size: ModelSize) -> LoraSettings:
    """The settings with "auto" replaced; the rank stays within the smallest adapted matrix.

    Raises:
        UserError: no module matches.
    """
    if settings.rank != "auto":
        return settings
    sides = [min(size.linear[name]) for name in choose_targets(size.linear, settings)]
    return settings.model_copy(update={"rank": min(recommend_rank(size.parameters), *sides)})


def resolve_optimizer(
    settings: OptimizerSettings, parameters: int, method: Method, mode: Mode, updates: int
) -> OptimizerSettings:
    """The settings with "auto" replaced."""
    if settings.learning_rate != "auto":
        return settings
    return settings.model_copy(update={"learning_rate": recommend_learning_rate(parameters, method, mode, updates)})


def rank_warnings(settings: LoraSettings, parameters: int) -> list[str]:
    """One line for each thing about the adapter's size and scale that looks wrong; ranks are resolved."""
    lines = []
    ranks = {settings.rank, *settings.rank_pattern.values()}
    if min(ranks) < RANKS[0] and parameters >= TOY:
        lines.append(
            f"lora: rank {min(ranks)} is below 32, the least that verl advises for RL; LoRA Without Regret finds even "
            f"rank 1 enough for policy gradients, so keep it if memory matters (auto: {recommend_rank(parameters)})"
        )
    if max(ranks) > 512:
        lines.append(f"lora: rank {max(ranks)} is above 512, the most that vLLM serves")
    elif max(ranks) > 4 * recommend_rank(parameters):
        auto = recommend_rank(parameters)
        lines.append(f"lora: rank {max(ranks)} costs memory and time, and RL rarely uses it (auto: {auto})")
    for rank in sorted(ranks):
        alphas = (settings.alpha, *settings.alpha_pattern.values())
        effective = [alpha * math.sqrt(rank) if settings.rslora else alpha for alpha in alphas]
        odd = [alpha for alpha in effective if not REFERENCE_ALPHA / 8 <= alpha <= REFERENCE_ALPHA * 16]
        if odd:
            how = "alpha * sqrt(rank), with rsLoRA," if settings.rslora else "alpha"
            lines.append(
                f"lora: {how} is {odd[0]:g} at rank {rank}, far from the {REFERENCE_ALPHA:g} that learning rates are "
                f"known for: the weights move {odd[0] / REFERENCE_ALPHA:.2g} times as fast as the rate suggests"
            )
            break
    return lines


def rate_warnings(
    section: str, settings: OptimizerSettings, parameters: int, method: Method, mode: Mode, updates: int
) -> list[str]:
    """One line when the learning rate looks wrong for the method; `section` is the config's name of the optimiser."""
    if parameters < TOY:
        return []
    rate, key = settings.learning_rate, f"{section}.learning_rate"
    full = recommend_learning_rate(parameters, method, "full", updates)
    auto = recommend_learning_rate(parameters, method, mode, updates)
    if mode == "full":
        if rate < LORA_FACTOR / 2 * full:
            return []
        return [f"{key} = {rate:g} looks like a LoRA rate: full fine-tuning wants about a tenth (auto: {auto:g})"]
    if rate <= 2 * full:
        return [f"{key} = {rate:g} looks like a full fine-tuning rate: LoRA wants ten times that (auto: {auto:g})"]
    if rate > 10 * auto:
        return [f"{key} = {rate:g} is more than ten times what a model of this size is known to bear (auto: {auto:g})"]
    return []
