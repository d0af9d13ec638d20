"""The sequences of one generate call: prompts wait, are prefilled once for all their samples, decode, and make room.

A group's place in the cache is free again when its last sample has ended, and waiting prompts then join the ones that
are under way. Every token has a random number of its own, which depends on neither.

Legend: N groups in the cache, A active sequences, R rows of hidden states, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from tuneloop.errors import UserError
from tuneloop.models.forward import head_weight, hidden_states
from tuneloop.models.packed import pack
from tuneloop.rng import uniforms
from tuneloop.rollout.engine import Completion, SampleStream
from tuneloop.rollout.kv_cache import Decode, GroupCache, Prefill
from tuneloop.rollout.sampler import draw
from tuneloop.settings import SamplingSettings

PREFILL_TOKENS = 32_768  # prompt tokens of one forward pass: bounds its activations whatever the prompts' lengths


@dataclass
class _Sequence:
    """One completion while it grows."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False


class ContinuousBatch:
    """Samples every prompt `samples` times with at most `groups_at_once` prompts in the cache.

    Args:
        names: of the prompts, for their random numbers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        end_ids: frozenset[int],
        prompts: Sequence[Sequence[int]],
        *,
        samples: int,
        groups_at_once: int,
        sampling: SamplingSettings,
        stream: SampleStream,
        names: np.ndarray,
    ):
        self.model, self.end_ids, self.prompts, self.samples = model, end_ids, prompts, samples
        self.groups_at_once, self.sampling, self.stream, self.names = groups_at_once, sampling, stream, names
        self.sequences = [[_Sequence() for _ in range(samples)] for _ in prompts]
        self.waiting = 0  # the first prompt that is not in yet
        self.cache: GroupCache | None = None
        self.cached = np.empty(0, dtype=np.int64)  # prompts in the cache, in its order
        self.prompt_A = self.sample_A = self.token_A = np.empty(0, dtype=np.int64)
        self.drawn = np.zeros(len(prompts), dtype=np.int64)  # tokens that each prompt's sequences have

    def run(self, max_new_tokens: int) -> list[list[Completion]]:
        """All completions, in the order of the prompts."""
        while self.waiting < len(self.prompts) or self.prompt_A.size:
            self._admit()
            self._drop_finished(max_new_tokens)
            if self.prompt_A.size:
                self._decode()
                self._drop_finished(max_new_tokens)
        return [[Completion(s.token_ids, s.logprobs, s.finished) for s in group] for group in self.sequences]

    def _admit(self) -> None:
        """Prefill waiting prompts when a quarter of the cache is free: each time the cache is copied once."""
        alive = np.unique(self.prompt_A)
        free = self.groups_at_once - alive.size
        if self.waiting == len(self.prompts) or free < max(1, self.groups_at_once // 4):
            return
        end, tokens = self.waiting, 0
        while end < min(len(self.prompts), self.waiting + free):
            tokens += len(self.prompts[end])
            if tokens > PREFILL_TOKENS and end > self.waiting:
                break
            end += 1
        entering = np.arange(self.waiting, end)
        self.waiting = end
        fresh = GroupCache(self.samples)
        batch = pack([(self.prompts[index], []) for index in entering.tolist()], self.model.device)
        hidden_TD = hidden_states(self.model, batch.input_ids_T, batch.position_ids_T, Prefill(fresh, batch))
        hidden_ND = hidden_TD[batch.prompt_length_N.cumsum(0) - 1]
        row_A = np.repeat(np.arange(entering.size), self.samples)
        prompt_A, sample_A = entering[row_A], np.tile(np.arange(self.samples), entering.size)
        token_A = self._draw(hidden_ND, row_A, prompt_A, sample_A)
        self.drawn[entering] = 1
        if self.cache is not None and alive.size:
            self._keep(alive)
            self.cache.join(fresh)
            self.cached = np.concatenate([self.cached, entering])
        else:
            self.cache, self.cached = fresh, entering
        self.prompt_A = np.concatenate([self.prompt_A, prompt_A])
        self.sample_A = np.concatenate([self.sample_A, sample_A])
        self.token_A = np.concatenate([self.token_A, token_A])

    def _decode(self) -> None:
        """One more token for every active sequence."""
        assert self.cache is not None
        alive = np.unique(self.prompt_A)
        if 2 * alive.size <= self.cached.size and self.waiting == len(self.prompts):
            self._keep(alive)
        order = np.argsort(self.cached)
        row_A = order[np.searchsorted(self.cached, self.prompt_A, sorter=order)]
        place_A = self.drawn[self.prompt_A] - 1  # of the token that is fed, among its completion's
        lengths = np.array([len(self.prompts[prompt]) for prompt in self.cached.tolist()])
        step = Decode(self.cache, self._tensor(row_A), self._tensor(self.sample_A), self._tensor(place_A),
                      self._tensor(np.maximum(self.drawn[self.cached] - 1, 0)))  # fmt: skip
        positions = self._tensor(lengths[row_A] + place_A)
        hidden_AD = hidden_states(self.model, self._tensor(self.token_A), positions, step)
        self.token_A = self._draw(hidden_AD, np.arange(self.prompt_A.size), self.prompt_A, self.sample_A)
        self.drawn[alive] += 1

    def _drop_finished(self, max_new_tokens: int) -> None:
        going = np.array(
            [
                not self.sequences[p][s].finished and len(self.sequences[p][s].token_ids) < max_new_tokens
                for p, s in zip(self.prompt_A, self.sample_A, strict=True)
            ],
            dtype=bool,
        )
        if not going.all():
            self.prompt_A, self.sample_A, self.token_A = self.prompt_A[going], self.sample_A[going], self.token_A[going]

    def _keep(self, prompts: np.ndarray) -> None:
        assert self.cache is not None
        rows = np.flatnonzero(np.isin(self.cached, prompts))
        if rows.size < self.cached.size:
            self.cache.keep(self._tensor(rows))
            self.cached = self.cached[rows]

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.model.device)

    def _draw(self, hidden_RD: torch.Tensor, row_A: np.ndarray, prompt_A: np.ndarray, sample_A: np.ndarray):
        place_A = self.drawn[prompt_A]
        counters = np.stack(
            [np.full(len(prompt_A), self.stream.round), self.names[prompt_A], sample_A, place_A], axis=1
        ).astype(np.uint64)
        uniform_A = torch.from_numpy(uniforms(self.stream.seed, counters))
        logits_RV = F.linear(hidden_RD, head_weight(self.model))
        tokens, logprobs = draw(logits_RV, self._tensor(row_A), uniform_A.to(self.model.device), self.sampling)
        token_A = tokens.cpu().numpy()
        if logprobs.isnan().any():
            raise UserError("the model's logits are not numbers: its weights or its adapter are damaged, or training "
                            "diverged")  # fmt: skip
        for p, s, token, logprob in zip(prompt_A, sample_A, token_A.tolist(), logprobs.tolist(), strict=True):
            sequence = self.sequences[p][s]
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.finished = token in self.end_ids
        return token_A
