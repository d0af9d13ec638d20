"""Proximal policy optimisation: the clipped surrogate with a value head and generalised advantage estimation.

Schulman et al., 2017 (arXiv:1707.06347) and 2015 (arXiv:1506.02438). A state is the prompt with the tokens so far, an
action the next token; the reward of the completion comes with its last token, KL penalties with each.

Legend: W sampled tokens of a rollout, B completions, L longest completion, S scored tokens of a batch.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from tuneloop.algorithms.advantages import batch_normalised
from tuneloop.algorithms.aggregation import aggregate
from tuneloop.algorithms.grpo import grpo_loss
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import AdvantageInputs, Advantages, Algorithm, LossInputs, LossOutputs


def ppo_advantages(inputs: AdvantageInputs, settings: AlgorithmSettings) -> Advantages:
    """GAE's advantages, normalised over all tokens of the rollout, and the returns that values are trained towards."""
    assert inputs.values_W is not None
    lengths_B = inputs.lengths_NG.flatten()
    rewards_W = torch.zeros_like(inputs.values_W) if inputs.penalty_W is None else -inputs.penalty_W
    rewards_W = rewards_W.index_add(0, lengths_B.cumsum(0) - 1, inputs.rewards_NG.flatten().to(rewards_W))
    gae_W = generalised_advantages(rewards_W, inputs.values_W, lengths_B, settings.gamma, settings.gae_lambda)
    returns_W = gae_W + inputs.values_W
    unexplained = float(gae_W.var()) / max(float(returns_W.var()), 1e-12)
    metrics = {"value/explained_variance": 1.0 - unexplained, "value/mean": float(inputs.values_W.mean())}
    return Advantages(batch_normalised(gae_W), returns_W, metrics)


def generalised_advantages(
    rewards_W: torch.Tensor, values_W: torch.Tensor, lengths_B: torch.Tensor, gamma: float, lambda_: float
) -> torch.Tensor:
    """A_t = d_t + gamma lambda A_(t+1), with d_t = r_t + gamma V_(t+1) - V_t and nothing after the last token.

    Args:
        rewards_W, values_W: of each token; the value is of the state in which it was chosen.
        lengths_B: tokens of each completion.
    """
    lengths = lengths_B.tolist()
    rewards_BL = pad_sequence(list(rewards_W.split(lengths)), batch_first=True)
    values_BL = pad_sequence(list(values_W.split(lengths)), batch_first=True)  # 0 behind the end, as it should be
    advantages_BL = torch.zeros_like(values_BL)
    later_B = torch.zeros_like(values_BL[:, 0])
    next_B = torch.zeros_like(later_B)
    for place in reversed(range(values_BL.shape[1])):
        delta_B = rewards_BL[:, place] + gamma * next_B - values_BL[:, place]
        later_B = delta_B + gamma * lambda_ * later_B
        advantages_BL[:, place] = later_B
        next_B = values_BL[:, place]
    real_BL = torch.arange(values_BL.shape[1], device=lengths_B.device) < lengths_B[:, None]
    return advantages_BL[real_BL]


def ppo_loss(inputs: LossInputs, settings: AlgorithmSettings) -> LossOutputs:
    """GRPO's loss, with `dual_clip`, and `value_coefficient` times the clipped value loss.

    The value loss of a token is max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2) / 2, e being `value_clip`.

    Args:
        inputs: tokens of one micro-batch.
    """
    assert inputs.values_S is not None
    assert inputs.old_values_S is not None
    assert inputs.returns_S is not None
    policy = grpo_loss(inputs, settings)
    near_S = inputs.old_values_S + (inputs.values_S - inputs.old_values_S).clamp(
        -settings.value_clip, settings.value_clip
    )
    errors_S = torch.maximum((inputs.values_S - inputs.returns_S).square(), (near_S - inputs.returns_S).square())
    value_S = 0.5 * errors_S
    loss = policy.loss + settings.value_coefficient * aggregate(value_S, inputs, settings)
    return LossOutputs(loss, {**policy.token_sums, "value/loss": float(value_S.detach().sum())})


PPO = Algorithm(ppo_advantages, ppo_loss, heads=("values_S",), learns_from_all=True)
