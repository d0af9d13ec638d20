"""Group relative policy optimisation: the clipped surrogate with group advantages.

Shao et al., 2024 (arXiv:2402.03300), equation 3, with a truncated importance weight for the engine's numerics.
"""

import torch

from tuneloop.algorithms.aggregation import aggregate
from tuneloop.algorithms.correction import truncated_importance
from tuneloop.algorithms.kl import kl_estimate
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import LossInputs, LossOutputs


def grpo_loss(inputs: LossInputs, settings: AlgorithmSettings) -> LossOutputs:
    """-w min(r A, clip(r, 1 - low, 1 + high) A) + beta KL, with r = pi / pi_old and w the truncated importance weight.

    Args:
        inputs: tokens of one micro-batch.

    Returns:
        The loss (scalar) and, summed over tokens, `clip` (tokens whose gradient the clip stopped), `kl`, `importance`.
    """
    advantages_S = inputs.advantages_B[inputs.completion_of_S]
    ratio_S = (inputs.logprobs_S - inputs.old_logprobs_S).exp()
    clipped_S = ratio_S.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    gain_S = torch.minimum(ratio_S * advantages_S, clipped_S * advantages_S)
    weight_S = truncated_importance(inputs.old_logprobs_S, inputs.behaviour_logprobs_S, settings.importance_cap)
    loss_S = -weight_S * gain_S
    stopped_S = (clipped_S * advantages_S < ratio_S * advantages_S).detach()
    sums = {"clip": float(stopped_S.sum()), "importance": float(weight_S.sum())}
    if inputs.reference_logprobs_S is not None and settings.kl_coefficient > 0:
        kl_S = kl_estimate(inputs.logprobs_S, inputs.reference_logprobs_S, settings.kl_estimator)
        loss_S = loss_S + settings.kl_coefficient * kl_S
    return LossOutputs(aggregate(loss_S, inputs, settings.aggregation), sums)
