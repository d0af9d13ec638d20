"""What is trained: a model with adapter layers."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from tuneloop.models.adapter_io import Adapter
from tuneloop.models.lora import LoraLinear, extract, install, trainable_parameters


@dataclass
class Policy:
    """A model, the adapter layers that are trained, and their PEFT config.

    Several policies may share one model; `install` puts one's layers into it.
    """

    model: PreTrainedModel
    layers: dict[str, LoraLinear]
    adapter_config: dict

    def adapter(self) -> Adapter:
        """A copy of the adapter as it is now."""
        return extract(self.layers, self.adapter_config)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that is trained, in a stable order."""
        return trainable_parameters(self.layers)

    def install(self) -> None:
        """Make the model compute with this policy's layers."""
        install(self.model, self.layers)
