"""The second phase of an update: advantages, and the packed minibatches that carry a learning signal.

Legend: N prompts, G completions a prompt, B completions, S scored tokens.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers import PreTrainedModel

from tuneloop.algorithms.advantages import grpo_advantages
from tuneloop.models.forward import score
from tuneloop.models.packed import Group, PackedBatch, pack
from tuneloop.training.balance import partition
from tuneloop.training.batching import micro_batches, packed_length
from tuneloop.training.collect import Rollout
from tuneloop.training.reference import ReferencePolicy
from tuneloop.training.settings import RlSettings
from tuneloop.training.world import World

PROBED_PROMPTS = 8  # prompts on which KL is measured when it is not in the loss


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: packed tokens with what each of them needs for the loss."""

    batch: PackedBatch
    behaviour_S: torch.Tensor
    advantages_B: torch.Tensor
    lengths_B: torch.Tensor
    old_S: torch.Tensor | None  # None: the update's own forward pass gives it (on-policy)
    reference_S: torch.Tensor | None


@dataclass(frozen=True)
class Minibatch:
    """What one optimiser step learns from; the totals count skipped completions too."""

    micro: list[MicroBatch]
    token_total: int
    completion_total: int


def score_rollout(
    model: PreTrainedModel,
    reference: ReferencePolicy,
    rollout: Rollout,
    settings: RlSettings,
    world: World | None = None,
) -> list[Minibatch]:
    """Advantages, this process's minibatches, and the log-probs that the update's own forward pass cannot give.

    A group whose rewards are all equal teaches nothing and is left out, unless KL is in the loss. Every process holds
    the whole rollout; what is left of a minibatch is shared so that all have about the same work.
    """
    world = world or World()
    advantages_NG = grpo_advantages(rollout.rewards_NG())
    with_kl = settings.algorithm.kl_coefficient > 0
    prompts = len(rollout.groups)
    bounds = [prompts * i // settings.algorithm.minibatches for i in range(settings.algorithm.minibatches + 1)]
    minibatches = []
    for first, end in pairwise(bounds):
        members = range(first, end)
        kept = [n for n in members if with_kl or bool(advantages_NG[n].any())]
        costs = [packed_length(_group(rollout, n)) for n in kept]
        kept = [kept[i] for i in partition(costs, world.size)[world.rank]]
        groups: list[Group] = [_group(rollout, n) for n in kept]
        micro = [
            # The first minibatch is trained on the very policy that was rolled out: the update's forward pass will do.
            _micro_batch(
                model, reference, rollout, [kept[i] for i in indices], advantages_NG, settings, on_policy=first == 0
            )
            for indices in micro_batches(groups, settings.micro_batch_tokens)
        ]
        completions = [completion for n in members for completion in rollout.groups[n].completions]
        minibatches.append(Minibatch(micro, sum(len(c.token_ids) for c in completions), len(completions)))
    return minibatches


def _micro_batch(model, reference, rollout, numbers, advantages_NG, settings, *, on_policy: bool) -> MicroBatch:
    batch = pack([_group(rollout, n) for n in numbers], model.device)
    completions = [completion for n in numbers for completion in rollout.groups[n].completions]
    temperature = settings.sampling.temperature
    old_S = None
    if not on_policy:
        with torch.no_grad():
            model.eval()
            old_S = score(model, batch, temperature).logprobs_S
    with_kl = settings.algorithm.kl_coefficient > 0
    return MicroBatch(
        batch=batch,
        behaviour_S=torch.tensor([x for c in completions for x in c.logprobs], device=model.device),
        advantages_B=advantages_NG[numbers].flatten().to(model.device),
        lengths_B=torch.tensor([len(c.token_ids) for c in completions], device=model.device),
        old_S=old_S,
        reference_S=reference.logprobs(batch, temperature) if with_kl else None,
    )


@torch.no_grad()
def probe_kl(model: PreTrainedModel, reference: ReferencePolicy, rollout: Rollout, temperature: float) -> float:
    """Mean log-prob difference (k1, nats a token) of policy and reference on a few of the round's prompts."""
    batch = pack([_group(rollout, n) for n in range(min(PROBED_PROMPTS, len(rollout.groups)))], model.device)
    model.eval()
    policy_S = score(model, batch, temperature).logprobs_S
    return float((policy_S - reference.logprobs(batch, temperature)).mean())


def _group(rollout: Rollout, n: int) -> Group:
    group = rollout.groups[n]
    return group.prompt, [completion.token_ids for completion in group.completions]
