"""The built-in rollout engine: merged weights, prompts prefilled once a group, continuous batching."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuneloop.data.chat import end_of_turn_id
from tuneloop.errors import UserError
from tuneloop.models.adapter_io import Adapter
from tuneloop.models.forward import score
from tuneloop.models.load import load_model, load_tokenizer
from tuneloop.models.lora_linear import LoraLinear
from tuneloop.models.packed import pack
from tuneloop.models.rounding import fold
from tuneloop.rollout.continuous_batch import ContinuousBatch
from tuneloop.rollout.engine import DEFAULT_ADAPTER, Completion, SampleStream
from tuneloop.settings import SamplingSettings


class TorchEngine:
    """A `RolloutEngine` on a transformers model.

    Either owns a model loaded from a folder, or shares the trainer's (`TorchEngine.sharing`): the base weights are
    then held once, and only the adapted matrices have a second, merged copy.
    """

    def __init__(
        self,
        model_folder: Path,
        *,
        dtype: str = "bfloat16",
        max_sequences: int = 512,
        device: str | torch.device | None = None,
    ):
        model = load_model(model_folder, dtype, device)
        self._set_up(model, load_tokenizer(model_folder), max_sequences)

    @classmethod
    def sharing(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_sequences: int = 512
    ) -> "TorchEngine":
        """An engine over a model that somebody else trains."""
        engine = cls.__new__(cls)
        engine._set_up(model, tokenizer, max_sequences)
        return engine

    def _set_up(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_sequences: int) -> None:
        self.model, self.max_sequences = model, max_sequences
        self.end_ids = end_token_ids(model) | {end_of_turn_id(tokenizer)}
        self._adapters: dict[str, Adapter | None] = {}
        self._merged: dict[str, torch.Tensor] = {}  # of the adapter `_merged_name`
        self._merged_name = DEFAULT_ADAPTER

    def sync(self, adapter: Adapter | None, name: str = DEFAULT_ADAPTER) -> str:
        """Merge the adapter into copies of the matrices that it adapts; the base stays as it is.

        Raises:
            UserError: the adapter was made for another model.
        """
        self._adapters[name] = adapter
        self._merge(name)
        return adapter.digest() if adapter else ""

    @torch.no_grad()
    def _merge(self, name: str) -> None:
        adapter = self._adapters.get(name)
        factors = adapter.factors if adapter else {}
        self._merged_name = name
        self._merged = {module: tensor for module, tensor in self._merged.items() if module in factors}
        for module, (a, b) in factors.items():
            weight = _linear(self.model, module).weight
            if (b.shape[0], a.shape[1]) != tuple(weight.shape):
                raise UserError(f"the adapter was made for another base: {module} has another shape")
            # From zero: a matrix that were left as it was before would pass for the new one for many updates.
            merged = self._merged[module].zero_() if module in self._merged else torch.zeros_like(weight)
            fold(weight, a, b, adapter.scaling(module), merged)  # type: ignore[union-attr]
            self._merged[module] = merged

    def sleep(self) -> None:
        """The weights are the trainer's: there is nothing to give back."""

    def wake(self) -> None:
        """Always awake."""

    def close(self) -> None:
        """Forget the merged matrices."""
        self._merged, self._adapters = {}, {}

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int,
        sampling: SamplingSettings,
        max_new_tokens: int,
        stream: SampleStream,
        adapter: str = DEFAULT_ADAPTER,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`."""
        indices = stream.prompt_indices if stream.prompt_indices is not None else range(len(prompts))
        names = np.asarray(indices, dtype=np.uint64)
        with self._weights(adapter):
            batch = ContinuousBatch(
                self.model,
                self.end_ids,
                prompts,
                samples=samples,
                groups_at_once=max(1, self.max_sequences // samples),
                sampling=sampling,
                stream=stream,
                names=names,
            )
            return batch.run(max_new_tokens)

    @torch.no_grad()
    def logprobs(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], adapter: str = DEFAULT_ADAPTER
    ) -> list[list[float]]:
        """See `RolloutEngine.logprobs`."""
        batch = pack([(prompt, [completion]) for prompt, completion in pairs], self.model.device)
        with self._weights(adapter):
            logprobs_S = score(self.model, batch).logprobs_S
        return [part.tolist() for part in logprobs_S.split([len(completion) for _, completion in pairs])]

    @contextmanager
    def _weights(self, adapter: str) -> Iterator[None]:
        """Compute with the merged matrices instead of base + adapter, then put everything back."""
        if adapter != self._merged_name:
            self._merge(adapter)
        lora = [module for module in self.model.modules() if isinstance(module, LoraLinear)]
        was_enabled = [layer.enabled for layer in lora]
        linears = {name: _linear(self.model, name) for name in self._merged}
        originals = {name: linear.weight.data for name, linear in linears.items()}
        was_training = self.model.training
        try:
            self.model.eval()
            for layer in lora:
                layer.enabled = False
            for name, linear in linears.items():
                linear.weight.data = self._merged[name]
            yield
        finally:
            for name, linear in linears.items():
                linear.weight.data = originals[name]
            for layer, enabled in zip(lora, was_enabled, strict=True):
                layer.enabled = enabled
            self.model.train(was_training)


def end_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a completion, from the generation config or the model's; may be empty."""
    for config in (model.generation_config, model.config):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise UserError(f"the adapter was made for another base: the model has no module {name}") from None
    module = module.base if isinstance(module, LoraLinear) else module
    if not isinstance(module, nn.Linear):
        raise UserError(f"the adapter was made for another base: {name} is no linear layer")
    return module
