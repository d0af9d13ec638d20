"""The built-in rollout engine: merged weights, prompts prefilled once a group, continuous batching."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuneloop.data.chat import end_of_turn_id
from tuneloop.models.adapter_io import Adapter
from tuneloop.models.forward import score
from tuneloop.models.load import load_model, load_tokenizer
from tuneloop.models.packed import pack
from tuneloop.rollout.continuous_batch import ContinuousBatch
from tuneloop.rollout.engine import DEFAULT_ADAPTER, Completion, SampleStream
from tuneloop.rollout.merged_weights import MergedWeights
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
        self._adapters: dict[str, Adapter | None] = {DEFAULT_ADAPTER: None}
        self._merged = MergedWeights(model)  # of the adapter `_merged_name`
        self._merged_name = DEFAULT_ADAPTER

    def sync(self, adapter: Adapter | None, name: str = DEFAULT_ADAPTER) -> str:
        """Merge the adapter into copies of the matrices that it adapts; the base stays as it is.

        Raises:
            UserError: the adapter was made for another model.
        """
        self._adapters[name] = adapter
        self._merge(name)
        return adapter.digest() if adapter else ""

    def _merge(self, name: str) -> None:
        self._merged.merge(self._adapters[name])
        self._merged_name = name

    def sleep(self) -> None:
        """The weights are the trainer's: there is nothing to give back."""

    def wake(self) -> None:
        """Always awake."""

    def close(self) -> None:
        """Forget the merged matrices."""
        self._merged.clear()
        self._adapters = {}

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
        if not pairs:
            return []
        batch = pack([(prompt, [completion]) for prompt, completion in pairs], self.model.device)
        with self._weights(adapter):
            logprobs_S = score(self.model, batch).logprobs_S
        return [part.tolist() for part in logprobs_S.split([len(completion) for _, completion in pairs])]

    def _weights(self, adapter: str) -> AbstractContextManager[None]:
        """The model computes with this adapter's merged matrices."""
        if adapter != self._merged_name:
            self._merge(adapter)
        return self._merged.installed()


def end_token_ids(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a completion, from the generation config or the model's; may be empty."""
    for config in (model.generation_config, model.config):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()
