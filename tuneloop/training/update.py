"""The third phase of an update: gradients of the policy loss, and the optimiser's steps.

Legend: S scored tokens.
"""

from collections import defaultdict
from collections.abc import Sequence

from transformers import PreTrainedModel

from tuneloop.algorithms.grpo import grpo_loss
from tuneloop.algorithms.types import LossInputs
from tuneloop.models.forward import score
from tuneloop.training.optim import Optimizer
from tuneloop.training.score import Minibatch
from tuneloop.training.settings import RlSettings
from tuneloop.training.world import World


def update_policy(
    model: PreTrainedModel,
    optimizer: Optimizer,
    minibatches: Sequence[Minibatch],
    settings: RlSettings,
    world: World | None = None,
) -> dict[str, float]:
    """One optimiser step a minibatch that has anything to learn from.

    Returns:
        Metrics of docs/metrics.md; `update/steps` is how many optimiser steps were made.
    """
    world = world or World()
    sums: dict[str, float] = defaultdict(float)
    largest_gap, norms, rate, steps = 0.0, [], optimizer.learning_rate(optimizer.updates), 0
    model.train()
    for minibatch in minibatches:
        for micro in minibatch.micro:
            scores = score(model, micro.batch, settings.sampling.temperature)
            detached_S = scores.logprobs_S.detach()
            old_S = detached_S if micro.old_S is None else micro.old_S
            outputs = grpo_loss(
                LossInputs(
                    logprobs_S=scores.logprobs_S,
                    old_logprobs_S=old_S,
                    behaviour_logprobs_S=micro.behaviour_S,
                    reference_logprobs_S=micro.reference_S,
                    advantages_B=micro.advantages_B,
                    completion_of_S=micro.batch.completion_of_S,
                    lengths_B=micro.lengths_B,
                    token_total=minibatch.token_total,
                    completion_total=minibatch.completion_total,
                ),
                settings.algorithm,
            )
            optimizer.backward(outputs.loss)
            gap_S = micro.behaviour_S - old_S
            largest_gap = max(largest_gap, float(gap_S.abs().max()))
            for name, value in outputs.sums.items():
                sums[name] += value
            sums["loss"] += float(outputs.loss.detach())
            sums["tokens"] += gap_S.numel()
            sums["packed"] += micro.batch.input_ids_T.numel()
            sums["gap"] += float(gap_S.sum())
            sums["gap_size"] += float(gap_S.abs().sum())
            sums["entropy"] += float(scores.entropy_S.sum())
            if micro.reference_S is not None:
                sums["kl"] += float((detached_S - micro.reference_S).sum())
        if world.any(bool(minibatch.micro)):
            norm, rate = optimizer.step()
            norms.append(norm)
            steps += 1
    largest_gap = max(world.gather(largest_gap))
    return _metrics(defaultdict(float, world.sum(sums)), norms, rate, steps, largest_gap, settings)


def _metrics(sums, norms, rate, steps, largest_gap, settings) -> dict[str, float]:
    values = {"learning_rate": rate, "update/steps": float(steps), "update/packed_tokens": sums["packed"]}
    if not steps:
        return values
    tokens = sums["tokens"]
    values |= {
        "loss/policy": sums["loss"] / steps,
        "gradient/norm": sum(norms) / len(norms),
        "entropy": sums["entropy"] / tokens,
        "clip/share": sums["clip"] / tokens,
        "importance/mean": sums["importance"] / tokens,
        "divergence/kl": sums["gap"] / tokens,
        "divergence/mean": sums["gap_size"] / tokens,
        "divergence/max": largest_gap,
    }
    if settings.algorithm.kl_coefficient > 0:
        values["kl/reference"] = sums["kl"] / tokens
    return values
