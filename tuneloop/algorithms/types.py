"""What every policy loss takes and gives.

Legend: S scored tokens of a batch, B completions.
"""

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class LossInputs:
    """Log-probs (nats) of the same sampled tokens under the policies that matter, and what the samples were worth.

    Attributes:
        logprobs_S: under the policy in training; the only tensor with a gradient.
        old_logprobs_S: under the policy as it was when the rollout was made, computed by the trainer.
        behaviour_logprobs_S: as the rollout engine reported them.
        reference_logprobs_S: under the frozen reference; None when no KL is wanted.
        advantages_B: one a completion.
        completion_of_S: the completion that each token belongs to.
        token_total: scored tokens of the whole minibatch, over all its micro-batches and skipped groups.
        completion_total: completions of the whole minibatch, likewise.
        lengths_B: tokens of each completion.
    """

    logprobs_S: torch.Tensor
    old_logprobs_S: torch.Tensor
    behaviour_logprobs_S: torch.Tensor
    reference_logprobs_S: torch.Tensor | None
    advantages_B: torch.Tensor
    completion_of_S: torch.Tensor
    lengths_B: torch.Tensor
    token_total: int
    completion_total: int


@dataclass(frozen=True)
class LossOutputs:
    """The loss of a micro-batch, already divided so that micro-batches add up, and sums over tokens for metrics."""

    loss: torch.Tensor
    sums: dict[str, float] = field(default_factory=dict)
