"""The second phase of an update: advantages, and the packed minibatches that carry a learning signal.

Legend: N prompts, G completions a prompt, B completions, S scored tokens, W sampled tokens of the whole rollout.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import nn
from transformers import PreTrainedModel

from tuneloop.algorithms.dapo import overlong_penalty
from tuneloop.algorithms.kl import kl_estimate
from tuneloop.algorithms.table import ALGORITHMS
from tuneloop.algorithms.types import AdvantageInputs, Advantages
from tuneloop.models.forward import score
from tuneloop.models.packed import Group, PackedBatch, pack
from tuneloop.settings import SamplingSettings
from tuneloop.training.balance import GroupCost
from tuneloop.training.batching import packed_length, shared_out
from tuneloop.training.collect import Rollout
from tuneloop.training.prepass import Prepass, prepass
from tuneloop.training.reference import Reference
from tuneloop.training.settings import RlSettings
from tuneloop.world import World

PROBED_PROMPTS = 8  # prompts on which KL is measured when the objective does not hold the reference
PROBED_COMPLETIONS = 2  # of each


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: packed tokens with what each of them needs for the loss (see `LossInputs`)."""

    batch: PackedBatch
    behaviour_S: torch.Tensor
    advantages_S: torch.Tensor
    lengths_B: torch.Tensor
    old_S: torch.Tensor | None  # None: the update's own forward pass gives it (on-policy)
    reference_S: torch.Tensor | None
    old_values_S: torch.Tensor | None = None
    returns_S: torch.Tensor | None = None
    is_padding: bool = False  # teaches nothing: other processes have one more pass, and all must make equally many


@dataclass(frozen=True)
class Minibatch:
    """What one optimiser step learns from; the totals count skipped completions too."""

    micro: list[MicroBatch]
    token_total: int
    completion_total: int


@dataclass(frozen=True)
class _Scored:
    """A rollout with everything that is known of its tokens; `ends` holds where each group's tokens end in W."""

    groups: list[Group]
    ends: list[int]
    behaviour_W: torch.Tensor
    before: Prepass | None
    advantages: Advantages

    def of(self, values_W: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
        """The groups' part of a value a token."""
        return torch.cat([values_W[self.ends[n] : self.ends[n + 1]] for n in numbers])


def score_rollout(
    model: PreTrainedModel,
    reference: Reference,
    rollout: Rollout,
    settings: RlSettings,
    world: World | None = None,
    *,
    heads: nn.ModuleDict | None = None,
    max_new_tokens: int = 0,
) -> tuple[list[Minibatch], dict[str, float]]:
    """Advantages, this process's minibatches, and the log-probs that the update's own forward pass cannot give.

    A group whose advantages are all zero is left out where it teaches nothing: unless KL is in the loss or the
    algorithm learns from all. Every process holds the whole rollout; what is left of a minibatch is shared so that all
    have about the same work.

    Args:
        heads: what the algorithm trains beside the adapter.
        max_new_tokens: the longest completion; read by overlong shaping alone.

    Returns:
        The minibatches, and metrics.
    """
    world, heads = world or World(), nn.ModuleDict() if heads is None else heads
    groups: list[Group] = [(g.prompt, [completion.token_ids for completion in g.completions]) for g in rollout.groups]
    before = None
    if settings.algorithm.kl_in_reward or "values_S" in heads:
        before = prepass(model, reference, groups, settings, world, heads)
    advantages, metrics = _advantages(rollout, settings, before, max_new_tokens)
    scored = _Scored(
        groups,
        [0, *accumulate(sum(map(len, members)) for _, members in groups)],
        torch.tensor([x for g in rollout.groups for completion in g.completions for x in completion.logprobs]),
        before,
        advantages,
    )
    holds_reference = ALGORITHMS[settings.algorithm.name].needs_reference or settings.algorithm.kl_in_loss
    held = reference if holds_reference else None
    count = settings.algorithm.minibatches
    bounds = [len(groups) * i // count for i in range(count + 1)]
    minibatches = [
        _minibatch(model, held, scored, range(first, end), settings, world) for first, end in pairwise(bounds)
    ]
    if not holds_reference and not settings.algorithm.kl_in_reward and reference.kept:
        metrics["kl/reference"] = probe_kl(model, reference, rollout, settings.sampling.temperature)
    return minibatches, metrics


def _minibatch(
    model: PreTrainedModel,
    reference: Reference | None,
    scored: _Scored,
    members: range,
    settings: RlSettings,
    world: World,
) -> Minibatch:
    """This process's share of the groups `members`; `reference` is None when the loss does not read it."""
    learns_from_all = ALGORITHMS[settings.algorithm.name].learns_from_all or settings.algorithm.kl_in_loss
    groups, advantages_W = scored.groups, scored.advantages.advantages_W
    kept = [n for n in members if learns_from_all or bool(scored.of(advantages_W, [n]).any())]
    passes = shared_out([groups[n] for n in kept], settings.micro_batch_tokens, GroupCost.of(model.config), world)
    shortest = min(members, key=lambda n: packed_length(groups[n]))
    # The first minibatch is trained on the very policy that was rolled out: the update's own forward pass will do.
    on_policy = members.start == 0
    micro = []
    for indices in passes:
        numbers = [kept[i] for i in indices] or [shortest]
        batch = _micro_batch(model, reference, scored, numbers, settings, on_policy=on_policy)
        micro.append(replace(batch, is_padding=not indices))
    tokens = scored.ends[members.stop] - scored.ends[members.start]
    return Minibatch(micro, tokens, sum(len(groups[n][1]) for n in members))


def _advantages(
    rollout: Rollout, settings: RlSettings, before: Prepass | None, max_new_tokens: int
) -> tuple[Advantages, dict[str, float]]:
    """The algorithm's advantages, and metrics of what they were made from."""
    objective = settings.algorithm
    lengths_NG = torch.tensor([[len(c.token_ids) for c in group.completions] for group in rollout.groups])
    metrics: dict[str, float] = {}
    rewards_NG = rollout.rewards_NG()
    if objective.overlong_buffer:
        taken_NG = overlong_penalty(lengths_NG, max_new_tokens, objective)
        rewards_NG = rewards_NG - taken_NG
        metrics["reward/overlong_penalty"] = float(taken_NG.mean())
    penalty_W = None
    if before and before.reference_W is not None:
        kl_W = kl_estimate(before.old_W, before.reference_W, objective.kl_estimator)
        penalty_W = objective.kl_coefficient * kl_W
        metrics["kl/reference"] = float(kl_W.mean())
    inputs = AdvantageInputs(rewards_NG, lengths_NG, penalty_W, before.values_W if before else None)
    advantages = ALGORITHMS[objective.name].advantages(inputs, objective)
    return advantages, metrics | advantages.metrics


def _micro_batch(
    model: PreTrainedModel,
    reference: Reference | None,
    scored: _Scored,
    numbers: Sequence[int],
    settings: RlSettings,
    *,
    on_policy: bool,
) -> MicroBatch:
    batch = pack([scored.groups[n] for n in numbers], model.device)
    temperature = settings.sampling.temperature

    def part(values_W: torch.Tensor | None) -> torch.Tensor | None:
        return None if values_W is None else scored.of(values_W, numbers).to(model.device)

    old_S = None
    if not on_policy and scored.before:
        old_S = part(scored.before.old_W)
    elif not on_policy:
        with torch.no_grad():
            model.eval()
            old_S = score(model, batch, temperature).logprobs_S
    lengths = [len(completion) for n in numbers for completion in scored.groups[n][1]]
    return MicroBatch(
        batch=batch,
        behaviour_S=scored.of(scored.behaviour_W, numbers).to(model.device),
        advantages_S=scored.of(scored.advantages.advantages_W, numbers).to(model.device),
        lengths_B=torch.tensor(lengths, device=model.device),
        old_S=old_S,
        reference_S=reference.logprobs(batch, temperature) if reference else None,
        old_values_S=part(scored.before.values_W) if scored.before else None,
        returns_S=part(scored.advantages.returns_W),
    )


@torch.no_grad()
def probe_kl(model: PreTrainedModel, reference: Reference, rollout: Rollout, temperature: float) -> float:
    """Mean log-prob difference (k1, nats a token) of sampling policy and reference on a few of the round's prompts."""
    groups = [(group.prompt, group.completions[:PROBED_COMPLETIONS]) for group in rollout.groups[:PROBED_PROMPTS]]
    batch = pack([(prompt, [c.token_ids for c in completions]) for prompt, completions in groups], model.device)
    sampled_S = torch.tensor([x for _, completions in groups for c in completions for x in c.logprobs])
    return float((sampled_S - reference.logprobs(batch, temperature).cpu()).mean())


@torch.no_grad()
def rollout_gap(model: PreTrainedModel, rollout: Rollout, sampling: SamplingSettings, world: World) -> float:
    """Mean absolute gap (nats) of the trainer's and the engine's log-probs, on the shortest group of each process."""
    packed: list[Group] = [(group.prompt, [c.token_ids for c in group.completions]) for group in rollout.groups]
    shortest = min(range(len(packed)), key=lambda number: packed_length(packed[number]))
    was_training = model.training
    model.eval()
    logprobs_S = score(model, pack([packed[shortest]], model.device), sampling.temperature).logprobs_S.cpu()
    model.train(was_training)
    sampled = rollout.groups[shortest].completions
    behaviour_S = torch.tensor([value for completion in sampled for value in completion.logprobs])
    gaps = world.gather(float((logprobs_S - behaviour_S).abs().mean()))
    return sum(gaps) / len(gaps)
