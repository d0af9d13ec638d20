"""Per-token estimators of KL(policy || reference) from samples of the policy.

Schulman, "Approximating KL divergence", 2020. With r = q/p, p the policy and q the reference:
k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r.
"""

import torch


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
