"""What every algorithm takes and gives.

Legend: N prompts, G completions a prompt, W sampled tokens of a whole rollout (prompt by prompt, completion by
completion), S scored tokens of a batch, B completions of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tuneloop.algorithms.settings import AlgorithmSettings


@dataclass(frozen=True)
class AdvantageInputs:
    """What a whole rollout was worth.

    Attributes:
        rewards_NG: total rewards, after overlong shaping.
        lengths_NG: sampled tokens of each completion.
        penalty_W: what KL in the reward takes from every token, coefficient included; None without it.
        values_W: the value head's estimates before the update; None without a value head.
    """

    rewards_NG: torch.Tensor
    lengths_NG: torch.Tensor
    penalty_W: torch.Tensor | None = None
    values_W: torch.Tensor | None = None

    def returns_NG(self) -> torch.Tensor:
        """Rewards less the completions' KL penalties."""
        if self.penalty_W is None:
            return self.rewards_NG
        penalty = torch.segment_reduce(self.penalty_W, "sum", lengths=self.lengths_NG.flatten())
        return self.rewards_NG - penalty.view_as(self.rewards_NG)

    def spread(self, values_NG: torch.Tensor) -> torch.Tensor:
        """Every token's share of a value a completion: the value itself; shape (W,)."""
        return values_NG.flatten().repeat_interleave(self.lengths_NG.flatten())


@dataclass(frozen=True)
class Advantages:
    """How much better every sampled token was than expected; with a value head, what its value should have been."""

    advantages_W: torch.Tensor
    returns_W: torch.Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LossInputs:
    """Log-probs (nats) of the same sampled tokens under the policies that matter, and what the samples were worth.

    Attributes:
        logprobs_S: under the policy in training; with a gradient.
        old_logprobs_S: under the policy as it was when the rollout was made, computed by the trainer.
        behaviour_logprobs_S: as the rollout engine reported them.
        reference_logprobs_S: under the frozen reference; None when the objective does not hold it.
        advantages_S: one a token.
        completion_of_S: the completion that each token belongs to; tokens are in completion order.
        lengths_B: tokens of each completion.
        token_total: scored tokens of the whole minibatch, over all its micro-batches and skipped groups.
        completion_total: completions of the whole minibatch, likewise.
        values_S: the value head's estimates, with a gradient; old_values_S: before the update; returns_S: what they
            should be. Of PPO alone.
        log_z_B: the partition head's estimate for each completion's prompt, with a gradient. Of FlowRL alone.
    """

    logprobs_S: torch.Tensor
    old_logprobs_S: torch.Tensor
    behaviour_logprobs_S: torch.Tensor
    reference_logprobs_S: torch.Tensor | None
    advantages_S: torch.Tensor
    completion_of_S: torch.Tensor
    lengths_B: torch.Tensor
    token_total: int
    completion_total: int
    values_S: torch.Tensor | None = None
    old_values_S: torch.Tensor | None = None
    returns_S: torch.Tensor | None = None
    log_z_B: torch.Tensor | None = None

    def sum_B(self, value_S: torch.Tensor) -> torch.Tensor:
        """Each completion's sum over its tokens."""
        return torch.segment_reduce(value_S, "sum", lengths=self.lengths_B)

    def mean_B(self, value_S: torch.Tensor) -> torch.Tensor:
        """Each completion's mean over its tokens."""
        return self.sum_B(value_S) / self.lengths_B


@dataclass(frozen=True)
class LossOutputs:
    """The loss of a micro-batch, already divided so that micro-batches add up, and sums for metrics.

    Attributes:
        token_sums: metric to its sum over the micro-batch's tokens; reported as the mean over trained tokens.
        completion_sums: the same, over completions.
    """

    loss: torch.Tensor
    token_sums: dict[str, float] = field(default_factory=dict)
    completion_sums: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Algorithm:
    """An advantage estimator and a policy loss, with what they need.

    Attributes:
        heads: of `tuneloop.training.heads.HEADS`; each fills the field of `LossInputs` that it is named after.
        needs_reference: the loss reads the reference's log-probs whether or not KL is wanted.
        learns_from_all: a completion teaches something even if its advantage is 0.
    """

    advantages: Callable[[AdvantageInputs, AlgorithmSettings], Advantages]
    loss: Callable[[LossInputs, AlgorithmSettings], LossOutputs]
    heads: tuple[str, ...] = ()
    needs_reference: bool = False
    learns_from_all: bool = False
