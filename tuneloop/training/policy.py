"""What is trained: a model with adapter layers, or a whole model."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from tuneloop.models.adapter_io import Adapter
from tuneloop.models.lora import extract, install, trainable_parameters
from tuneloop.models.lora_linear import LoraLinear
from tuneloop.models.rounding import fold
from tuneloop.training.reference import Reference, ReferencePolicy, ReferenceWeights


@dataclass
class Policy:
    """A model, the adapter layers that are trained, and their PEFT config.

    Several policies may share one model; `install` puts one's layers into it.

    Attributes:
        init: how rows of A that are added in training start; see `LoraSettings.init`.
        start: the adapter that the layers were made from, when there is one.
    """

    model: PreTrainedModel
    layers: dict[str, LoraLinear]
    adapter_config: dict
    init: str = "kaiming"
    start: Adapter | None = None

    def adapter(self) -> Adapter:
        """A copy of the adapter as it is now."""
        return extract(self.layers, self.adapter_config)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that is trained, in a stable order."""
        return trainable_parameters(self.layers)

    def install(self) -> None:
        """Make the model compute with this policy's layers."""
        install(self.model, self.layers)

    def reference(self, needed: bool) -> Reference:
        """The policy as it starts, frozen; `needed` says whether the objective reads it."""
        return ReferencePolicy(self.model, self.layers, self.start or self.adapter())


@dataclass
class FullPolicy(Policy):
    """A model whose every weight is trained: the reference arm that LoRA is compared with."""

    layers: dict[str, LoraLinear] = field(default_factory=dict)
    adapter_config: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model.requires_grad_(True)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of every weight, in a stable order; a tied one once."""
        return iter(self.model.named_parameters())

    def reference(self, needed: bool) -> Reference:
        """The weights as they are now; copied only if the objective reads them, because the copy is a model's size."""
        return ReferenceWeights(self.model, keep=needed)


@torch.no_grad()
def absorb(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add an adapter to the weights of the model that it was made for, rounded as the rollout engine rounds them."""
    for name, (a, b) in adapter.factors.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        fold(weight, a, b, adapter.scaling(name), weight)
