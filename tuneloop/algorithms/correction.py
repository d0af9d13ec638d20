"""Correcting for the rollout engine's numerics: it samples from a policy slightly other than the trainer's."""

import torch


def truncated_importance(old_logprobs_S: torch.Tensor, behaviour_logprobs_S: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi_trainer / pi_engine, cap) a token, detached; ones when `cap` is 0.

    Truncated importance sampling (Ionides, 2008), applied a token as in Yao et al., "Your efficient RL framework
    secretly brings you off-policy RL training", 2025.
    """
    if cap == 0.0:
        return torch.ones_like(old_logprobs_S)
    return (old_logprobs_S - behaviour_logprobs_S).exp().clamp(max=cap).detach()
