"""The first phase of an update: sample completions and judge them.

Legend: N prompts, G completions a prompt.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from tuneloop.data.chat import render_prompts
from tuneloop.data.schema import Example
from tuneloop.rewards.base import Score, Scorer
from tuneloop.rollout.engine import DEFAULT_ADAPTER, Completion, RolloutEngine, SampleStream
from tuneloop.settings import SamplingSettings
from tuneloop.world import World


@dataclass(frozen=True)
class RolloutGroup:
    """One prompt and its sampled, judged completions."""

    example: Example
    prompt: list[int]
    completions: list[Completion]
    texts: list[str]
    scores: list[Score]


@dataclass(frozen=True)
class Rollout:
    """One round of sampling: the groups to learn from, and those that dynamic sampling replaced."""

    groups: list[RolloutGroup]
    discarded: list[RolloutGroup] = field(default_factory=list)

    def rewards_NG(self) -> torch.Tensor:
        """Total rewards of the groups to learn from, shape (N, G)."""
        return _rewards_NG(self.groups)

    def metrics(self, scorer: Scorer) -> dict[str, float]:
        """Rewards and lengths of all that was sampled; names are in docs/metrics.md."""
        groups = self.groups + self.discarded
        rewards_NG = _rewards_NG(groups)
        completions = [completion for group in groups for completion in group.completions]
        scores = [score for group in groups for score in group.scores]
        values = {
            "reward/mean": float(rewards_NG.mean()),
            "reward/std": float(rewards_NG.std()),
            "groups/zero_spread_share": float((rewards_NG == rewards_NG[:, :1]).all(1).float().mean()),
            "completion/tokens_mean": statistics.fmean(len(completion.token_ids) for completion in completions),
            "completion/truncated_share": statistics.fmean(not completion.finished for completion in completions),
            "groups/discarded": float(len(self.discarded)),
        }
        for name in scorer.names:
            values[f"reward/{name}/mean"] = statistics.fmean(score.parts[name] for score in scores)
        return values

    def tokens(self) -> int:
        """Sampled tokens."""
        groups = self.groups + self.discarded
        return sum(len(completion.token_ids) for group in groups for completion in group.completions)

    def accuracy(self, scorer: Scorer) -> float:
        """Share of correct completions."""
        return statistics.fmean(scorer.is_correct(score) for group in self.groups for score in group.scores)


def collect(
    engine: RolloutEngine,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    examples: Sequence[Example],
    *,
    samples: int,
    sampling: SamplingSettings,
    max_new_tokens: int,
    stream: SampleStream,
    adapter: str = DEFAULT_ADAPTER,
    world: World | None = None,
) -> Rollout:
    """Sample `samples` completions of every example and score them; each process takes its share of the examples.

    Raises:
        UserError: a reward failed.
    """
    world = world or World()
    mine = world.share(len(examples))
    prompts = render_prompts(tokenizer, [examples[index].messages for index in mine])
    sampled = engine.generate(
        prompts,
        samples=samples,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stream=SampleStream(stream.seed, stream.round, _names(stream, mine)),
        adapter=adapter,
    )
    groups = []
    for index, prompt, completions in zip(mine, prompts, sampled, strict=True):
        texts = tokenizer.batch_decode([completion.token_ids for completion in completions], skip_special_tokens=True)
        scores = [scorer.score(examples[index], text) for text in texts]
        groups.append(RolloutGroup(examples[index], prompt, completions, texts, scores))
    return Rollout(world.interleave(groups))


def _rewards_NG(groups: Sequence[RolloutGroup]) -> torch.Tensor:
    return torch.tensor([[score.total for score in group.scores] for group in groups])


def _names(stream: SampleStream, mine: Sequence[int]) -> list[int]:
    return list(mine) if stream.prompt_indices is None else [stream.prompt_indices[index] for index in mine]
