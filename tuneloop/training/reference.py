"""The reference policy that KL is measured against: the same base with the adapter as SFT left it.

Legend: S scored tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from tuneloop.models.adapter_io import Adapter
from tuneloop.models.forward import score
from tuneloop.models.lora import LoraLinear
from tuneloop.models.packed import PackedBatch


class ReferencePolicy:
    """A frozen copy of the factors, put in place of the trained ones for the length of a forward pass."""

    def __init__(self, model: PreTrainedModel, layers: dict[str, LoraLinear], adapter: Adapter):
        self.model, self.layers = model, layers
        self.digest = adapter.digest()
        self._factors = {
            name: (a.to(layers[name].A).clone(), b.to(layers[name].B).clone())
            for name, (a, b) in adapter.factors.items()
        }

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch, temperature: float) -> torch.Tensor:
        """Log-probs (nats) of the batch's scored tokens, shape (S,)."""
        with self._in_place():
            return score(self.model, batch, temperature).logprobs_S

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        trained = {name: (layer.A.data, layer.B.data) for name, layer in self.layers.items()}
        was_training = self.model.training
        try:
            self.model.eval()
            for name, layer in self.layers.items():
                layer.A.data, layer.B.data = self._factors[name]
            yield
        finally:
            for name, layer in self.layers.items():
                layer.A.data, layer.B.data = trained[name]
            self.model.train(was_training)
