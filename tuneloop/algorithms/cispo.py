"""Clipped importance sampling policy optimisation: the weight is clipped, the gradient of no token is lost.

MiniMax-M1, 2025 (arXiv:2506.13585), equations 4 and 5.
"""

from tuneloop.algorithms.advantages import group_normalised
from tuneloop.algorithms.aggregation import aggregate
from tuneloop.algorithms.correction import importance_weights
from tuneloop.algorithms.kl import with_kl
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import Algorithm, LossInputs, LossOutputs


def cispo_loss(inputs: LossInputs, settings: AlgorithmSettings) -> LossOutputs:
    """-w sg(clip(r, 1 - low, 1 + high)) A log pi + beta KL, sg stopping the gradient.

    Args:
        inputs: tokens of one micro-batch.

    Returns:
        The loss (scalar); `clip/share` sums the tokens whose ratio was clipped.
    """
    ratio_S = (inputs.logprobs_S - inputs.old_logprobs_S).detach().exp()
    clipped_S = ratio_S.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    weight_S, sums = importance_weights(inputs, settings)
    loss_S = with_kl(-weight_S * clipped_S * inputs.advantages_S * inputs.logprobs_S, inputs, settings)
    return LossOutputs(aggregate(loss_S, inputs, settings), {"clip/share": float((clipped_S != ratio_S).sum()), **sums})


CISPO = Algorithm(group_normalised, cispo_loss)
