"""How much better a completion was than expected: what several algorithms share.

Legend: N prompts, G completions a prompt, W sampled tokens of a rollout.
"""

import torch

from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import AdvantageInputs, Advantages

EPSILON = 1e-6


def grpo_advantages(rewards_NG: torch.Tensor) -> torch.Tensor:
    """(R - mean of the group) / (sample standard deviation of the group + 1e-6); shape (N, G).

    Shao et al., 2024 (arXiv:2402.03300), section 4.1.2. A group whose rewards are all equal gets exactly zero.
    """
    return centred(rewards_NG) / (rewards_NG.std(-1, keepdim=True) + EPSILON)


def centred(rewards_NG: torch.Tensor) -> torch.Tensor:
    """R - mean of the group; exactly zero where a group's rewards are all equal, whatever rounding does."""
    equal = (rewards_NG == rewards_NG[:, :1]).all(-1, keepdim=True)
    return torch.where(equal, 0.0, rewards_NG - rewards_NG.mean(-1, keepdim=True))


def group_normalised(inputs: AdvantageInputs, settings: AlgorithmSettings) -> Advantages:
    """GRPO's advantage, the same for all tokens of a completion."""
    return Advantages(inputs.spread(grpo_advantages(inputs.returns_NG())))


def rewards_to_go(inputs: AdvantageInputs) -> torch.Tensor:
    """The reward of the completion less the KL penalties of the token and all later ones; shape (W,)."""
    rewards_W = inputs.spread(inputs.rewards_NG)
    if inputs.penalty_W is None:
        return rewards_W
    parts = inputs.penalty_W.split(inputs.lengths_NG.flatten().tolist())
    return rewards_W - torch.cat([part.flip(0).cumsum(0).flip(0) for part in parts])


def batch_normalised(values: torch.Tensor) -> torch.Tensor:
    """(x - mean) / (sample standard deviation + 1e-6) over everything; zeros where all are equal."""
    if bool((values == values.flatten()[0]).all()):
        return torch.zeros_like(values)
    return (values - values.mean()) / (values.std() + EPSILON)
