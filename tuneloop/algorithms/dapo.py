"""DAPO: a higher upper clip, token mean, dynamic sampling and a soft penalty on overlong completions.

Yu et al., 2025 (arXiv:2503.14476). Dynamic sampling is in `tuneloop/training/dynamic_sampling.py`.
"""

import torch

from tuneloop.algorithms.advantages import group_normalised
from tuneloop.algorithms.grpo import grpo_loss
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import Algorithm


def overlong_penalty(lengths_NG: torch.Tensor, limit: int, settings: AlgorithmSettings) -> torch.Tensor:
    """What is taken from the reward: 0 up to limit - buffer tokens, then rising linearly to `overlong_penalty`.

    Equation 13, in which a completion of `limit` tokens is the longest there is.

    Args:
        lengths_NG: tokens of each completion.
        limit: the most that a completion may have.
    """
    if settings.overlong_buffer == 0:
        return torch.zeros(lengths_NG.shape)
    over_NG = lengths_NG - (limit - settings.overlong_buffer)
    return settings.overlong_penalty * (over_NG / settings.overlong_buffer).clamp(0.0, 1.0)


DAPO = Algorithm(group_normalised, grpo_loss)
