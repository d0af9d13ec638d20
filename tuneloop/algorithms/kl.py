"""Per-token estimators of KL(policy || reference) from samples of the policy, and what steers its coefficient.

Schulman, "Approximating KL divergence", 2020. With r = q/p, p the policy and q the reference:
k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r.
"""

import torch

from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import LossInputs

LARGEST_ERROR = 0.2


def kl_estimate(logprobs_S: torch.Tensor, reference_logprobs_S: torch.Tensor, estimator: str) -> torch.Tensor:
    """One estimate a token, nats.

    Args:
        logprobs_S, reference_logprobs_S: log-probs of the sampled tokens, nats.
        estimator: "k1" (unbiased, can be negative), "k2" (biased, low variance), "k3" (unbiased, never negative).
    """
    log_ratio_S = reference_logprobs_S - logprobs_S
    if estimator == "k1":
        return -log_ratio_S
    if estimator == "k2":
        return 0.5 * log_ratio_S.square()
    assert estimator == "k3"
    return torch.expm1(log_ratio_S) - log_ratio_S


def with_kl(loss_S: torch.Tensor, inputs: LossInputs, settings: AlgorithmSettings) -> torch.Tensor:
    """The loss of every token, with KL's part when it is in the loss."""
    if not settings.kl_in_loss:
        return loss_S
    assert inputs.reference_logprobs_S is not None
    kl_S = kl_estimate(inputs.logprobs_S, inputs.reference_logprobs_S, settings.kl_estimator)
    return loss_S + settings.kl_coefficient * kl_S


def steered_coefficient(coefficient: float, kl: float, completions: int, settings: AlgorithmSettings) -> float:
    """The coefficient of the next update: beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon).

    Ziegler et al., 2019 (arXiv:1909.08593), section 2.2.

    Args:
        coefficient: of this update.
        kl: measured in this update, nats a token.
        completions: n, of this update.
    """
    if settings.kl_target == 0.0:
        return coefficient
    error = min(max(kl / settings.kl_target - 1.0, -LARGEST_ERROR), LARGEST_ERROR)
    return coefficient * (1.0 + error * min(1.0, completions / settings.kl_horizon))
