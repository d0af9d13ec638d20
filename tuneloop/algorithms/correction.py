"""Correcting for the rollout engine's numerics: it samples from a policy slightly other than the trainer's.

Legend: S scored tokens.
"""

import torch

from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import LossInputs


def importance_weights(inputs: LossInputs, settings: AlgorithmSettings) -> tuple[torch.Tensor, dict[str, float]]:
    """A weight a token, detached, and its sums for metrics. With rho = pi_trainer / pi_engine, both before the update:

    none: 1;
    token: min(rho, cap), truncated importance sampling (Ionides, 2008) a token, as in Yao et al., "Your efficient RL
    framework secretly brings you off-policy RL training", 2025;
    sequence: min(product of rho over the completion, cap), for all its tokens;
    icepop: rho where low <= rho <= high, else 0 (Ling team, "Every step evolves", arXiv:2510.18855).
    """
    if settings.correction == "none":
        weight_S = torch.ones_like(inputs.old_logprobs_S)
        limited_S = torch.zeros_like(weight_S)
    else:
        log_rho_S = (inputs.old_logprobs_S - inputs.behaviour_logprobs_S).detach()
        if settings.correction == "sequence":
            log_rho_S = inputs.sum_B(log_rho_S)[inputs.completion_of_S]
        rho_S = log_rho_S.exp()
        if settings.correction == "icepop":
            limited_S = (rho_S < settings.icepop_low) | (rho_S > settings.icepop_high)
            weight_S = rho_S.masked_fill(limited_S, 0.0)
        else:
            limited_S = rho_S > settings.importance_cap
            weight_S = rho_S.clamp(max=settings.importance_cap)
    return weight_S, {"importance/mean": float(weight_S.sum()), "importance/limited_share": float(limited_S.sum())}
