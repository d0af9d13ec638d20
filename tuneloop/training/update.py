"""The third phase of an update: gradients of the policy loss, and the optimiser's steps.

Legend: S scored tokens.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from tuneloop.algorithms.table import ALGORITHMS
from tuneloop.algorithms.types import LossInputs, LossOutputs
from tuneloop.training.heads import score_with_heads
from tuneloop.training.optim import Optimizer
from tuneloop.training.score import MicroBatch, Minibatch
from tuneloop.training.settings import RlSettings
from tuneloop.world import World


def update_policy(
    model: PreTrainedModel,
    optimizer: Optimizer,
    minibatches: Sequence[Minibatch],
    settings: RlSettings,
    world: World | None = None,
    heads: nn.ModuleDict | None = None,
) -> dict[str, float]:
    """One optimiser step a minibatch that has anything to learn from.

    Args:
        heads: what the algorithm trains beside the adapter.

    Returns:
        Metrics of docs/metrics.md; `update/steps` is how many optimiser steps were made.
    """
    world, heads = world or World(), nn.ModuleDict() if heads is None else heads
    loss_of = ALGORITHMS[settings.algorithm.name].loss
    tally = _Tally()
    norms, rate = [], optimizer.learning_rate(optimizer.updates)
    model.train()
    for minibatch in minibatches:
        for micro in minibatch.micro:
            inputs, entropy_S = _loss_inputs(model, heads, micro, minibatch, settings.sampling.temperature)
            outputs = loss_of(inputs, settings.algorithm)
            if micro.is_padding:
                optimizer.backward(0.0 * outputs.loss)
                continue
            optimizer.backward(outputs.loss)
            tally.add(inputs, outputs, entropy_S, micro.batch.input_ids_T.numel())
        if world.any(bool(minibatch.micro)):
            norm, rate = optimizer.step()
            norms.append(norm)
    return tally.metrics(norms, rate, world)


def _loss_inputs(
    model: PreTrainedModel, heads: nn.ModuleDict, micro: MicroBatch, minibatch: Minibatch, temperature: float
) -> tuple[LossInputs, torch.Tensor]:
    scores, estimates = score_with_heads(model, heads, micro.batch, temperature)
    inputs = LossInputs(
        logprobs_S=scores.logprobs_S,
        old_logprobs_S=scores.logprobs_S.detach() if micro.old_S is None else micro.old_S,
        behaviour_logprobs_S=micro.behaviour_S,
        reference_logprobs_S=micro.reference_S,
        advantages_S=micro.advantages_S,
        completion_of_S=micro.batch.completion_of_S,
        lengths_B=micro.lengths_B,
        token_total=minibatch.token_total,
        completion_total=minibatch.completion_total,
        old_values_S=micro.old_values_S,
        returns_S=micro.returns_S,
        **estimates,
    )
    return inputs, scores.entropy_S


class _Tally:
    """Sums over this process's micro-batches, from which the update's metrics are made."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._by_token: dict[str, float] = defaultdict(float)
        self._by_completion: dict[str, float] = defaultdict(float)
        self._largest_gap = 0.0

    def add(self, inputs: LossInputs, outputs: LossOutputs, entropy_S: torch.Tensor, packed: int) -> None:
        """Count a micro-batch of `packed` rows."""
        gap_S = inputs.behaviour_logprobs_S - inputs.old_logprobs_S
        self._largest_gap = float(np.maximum(self._largest_gap, float(gap_S.abs().max())))  # hands NaN on
        self._sums["loss"] += float(outputs.loss.detach())
        self._sums["tokens"] += gap_S.numel()
        self._sums["completions"] += inputs.lengths_B.numel()
        self._sums["packed"] += packed
        by_token = {
            "entropy": float(entropy_S.sum()),
            "divergence/kl": float(gap_S.sum()),
            "divergence/mean": float(gap_S.abs().sum()),
            **outputs.token_sums,
        }
        if inputs.reference_logprobs_S is not None:
            by_token["kl/reference"] = float((inputs.logprobs_S.detach() - inputs.reference_logprobs_S).sum())
        for name, value in by_token.items():
            self._by_token[name] += value
        for name, value in outputs.completion_sums.items():
            self._by_completion[name] += value

    def metrics(self, norms: Sequence[float], rate: float, world: World) -> dict[str, float]:
        """Means over all processes' tokens, completions and steps."""
        sums = defaultdict(float, world.sum(self._sums))
        by_token, by_completion = world.sum(self._by_token), world.sum(self._by_completion)
        largest_gap = float(np.max(world.gather(self._largest_gap)))
        values = {"learning_rate": rate, "update/steps": float(len(norms)), "update/packed_tokens": sums["packed"]}
        if not norms:
            return values
        return values | {
            "loss/policy": sums["loss"] / len(norms),
            "gradient/norm": sum(norms) / len(norms),
            "divergence/max": largest_gap,
            **{name: value / sums["tokens"] for name, value in by_token.items()},
            **{name: value / sums["completions"] for name, value in by_completion.items()},
        }
