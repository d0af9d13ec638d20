"""The reference policy that KL is measured against: the policy as SFT left it.

Legend: S scored tokens.
"""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from tuneloop.models.adapter_io import Adapter
from tuneloop.models.digest import weights_digest
from tuneloop.models.forward import score
from tuneloop.models.lora_linear import LoraLinear
from tuneloop.models.packed import PackedBatch


class Reference(Protocol):
    """The policy before training.

    Attributes:
        digest: of what it computes with.
        kept: whether it can compute at all.
    """

    digest: str
    kept: bool

    def logprobs(self, batch: PackedBatch, temperature: float) -> torch.Tensor:
        """Log-probs (nats) of the batch's scored tokens, shape (S,)."""
        ...


class ReferencePolicy:
    """A frozen copy of the factors, which stands in for the trained ones for the length of a forward pass.

    The copy keeps its own ranks when those of the layers change; their scaling does not.
    """

    kept = True

    def __init__(self, model: PreTrainedModel, layers: dict[str, LoraLinear], adapter: Adapter):
        self.model, self.layers = model, layers
        self.digest = adapter.digest()
        self._factors = {}
        for name, (a, b) in adapter.factors.items():
            layer, scaling = layers[name], adapter.scaling(name)
            if scaling != layer.scaling:
                b = b.float() * (scaling / layer.scaling)  # what `extract` had folded into B
            self._factors[name] = (a.to(layer.A).clone(), b.to(layer.B).clone())

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch, temperature: float) -> torch.Tensor:
        """See `Reference.logprobs`."""
        was_training = self.model.training
        try:
            self.model.eval()
            for name, (a, b) in self._factors.items():  # ZeRO may have moved the model since the copy was made
                self._factors[name] = (a.to(batch.input_ids_T.device), b.to(batch.input_ids_T.device))
                self.layers[name].stand_in = self._factors[name]
            return score(self.model, batch, temperature).logprobs_S
        finally:
            for layer in self.layers.values():
                layer.stand_in = None
            self.model.train(was_training)


class ReferenceWeights:
    """A frozen copy of every weight of a model that is trained whole.

    Args:
        keep: make the copy, as large as the model; without it only the digest is known.
    """

    def __init__(self, model: PreTrainedModel, keep: bool):
        self.model, self.kept, self.digest = model, keep, weights_digest(model)
        self._copies = [parameter.detach().clone() for parameter in model.parameters()] if keep else []

    @torch.no_grad()
    def logprobs(self, batch: PackedBatch, temperature: float) -> torch.Tensor:
        """See `Reference.logprobs`."""
        assert self.kept, "the reference was not kept: nothing was to need it"
        trained = [parameter.data for parameter in self.model.parameters()]
        was_training = self.model.training
        try:
            self.model.eval()
            for parameter, copy in zip(self.model.parameters(), self._copies, strict=True):
                parameter.data = copy
            return score(self.model, batch, temperature).logprobs_S
        finally:
            for parameter, value in zip(self.model.parameters(), trained, strict=True):
                parameter.data = value
            self.model.train(was_training)
