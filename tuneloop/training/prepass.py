"""What the trainer computes of a whole rollout before any advantage is known: values, and log-probs for KL in reward.

Legend: W sampled tokens of the rollout, prompt by prompt and completion by completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from tuneloop.models.packed import Group, pack
from tuneloop.training.balance import GroupCost
from tuneloop.training.batching import packed_length, shared_out
from tuneloop.training.heads import score_with_heads
from tuneloop.training.reference import Reference
from tuneloop.training.settings import RlSettings
from tuneloop.world import World


@dataclass(frozen=True)
class Prepass:
    """Of every sampled token, in host memory: the policy's log-prob, and where wanted the reference's and the value."""

    old_W: torch.Tensor
    reference_W: torch.Tensor | None
    values_W: torch.Tensor | None


@torch.no_grad()
def prepass(
    model: PreTrainedModel,
    reference: Reference,
    groups: Sequence[Group],
    settings: RlSettings,
    world: World,
    heads: nn.ModuleDict,
) -> Prepass:
    """Score the whole rollout; each process takes its share of the groups, and all get everything."""
    wants_values = "values_S" in heads
    columns = ["old", *(["reference"] if settings.algorithm.kl_in_reward else []), *(["value"] if wants_values else [])]
    shortest = min(range(len(groups)), key=lambda n: packed_length(groups[n]))
    model.eval()
    found: dict[int, torch.Tensor] = {}
    for indices in shared_out(groups, settings.micro_batch_tokens, GroupCost.of(model.config), world):
        numbers = indices or [shortest]  # an empty pass is made with something that another process has too
        batch = pack([groups[n] for n in numbers], model.device)
        scores, estimates = score_with_heads(model, heads, batch, settings.sampling.temperature)
        values = [scores.logprobs_S]
        if settings.algorithm.kl_in_reward:
            values.append(reference.logprobs(batch, settings.sampling.temperature))
        if wants_values:
            values.append(estimates["values_S"])
        sizes = [sum(map(len, groups[n][1])) for n in numbers]
        found |= dict(zip(numbers, torch.stack(values).cpu().split(sizes, dim=1), strict=True))
    everything = {n: part for parts in world.gather(found) for n, part in parts.items()}
    rows = dict(zip(columns, torch.cat([everything[n] for n in range(len(groups))], dim=1), strict=True))
    return Prepass(rows["old"], rows.get("reference"), rows.get("value"))
