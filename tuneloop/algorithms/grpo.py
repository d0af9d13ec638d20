"""Group relative policy optimisation: the clipped surrogate with group advantages.

Shao et al., 2024 (arXiv:2402.03300), equation 3, with an importance weight for the engine's numerics. Its loss serves
the algorithms that differ in their advantages alone.
"""

import torch

from tuneloop.algorithms.advantages import group_normalised
from tuneloop.algorithms.aggregation import aggregate
from tuneloop.algorithms.correction import importance_weights
from tuneloop.algorithms.kl import with_kl
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import Algorithm, LossInputs, LossOutputs


def grpo_loss(inputs: LossInputs, settings: AlgorithmSettings) -> LossOutputs:
    """-w min(r A, clip(r, 1 - low, 1 + high) A) + beta KL, with r = pi / pi_old and w the importance weight.

    With `dual_clip` c, a token with A < 0 gains at least c A (Ye et al., 2019, arXiv:1912.09729).

    Args:
        inputs: tokens of one micro-batch.

    Returns:
        The loss (scalar); token sums `clip/share` (tokens whose gradient a clip stopped) and the importance weight's.
    """
    advantages_S = inputs.advantages_S
    ratio_S = (inputs.logprobs_S - inputs.old_logprobs_S).exp()
    clipped_S = ratio_S.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    free_S = ratio_S * advantages_S
    gain_S = torch.minimum(free_S, clipped_S * advantages_S)
    stopped_S = gain_S.detach() < free_S.detach()
    if settings.dual_clip > 0:
        floor_S = settings.dual_clip * advantages_S
        below_S = (advantages_S < 0) & (gain_S.detach() < floor_S)
        gain_S = torch.where(below_S, floor_S, gain_S)
        stopped_S = stopped_S | below_S
    weight_S, sums = importance_weights(inputs, settings)
    loss = aggregate(with_kl(-weight_S * gain_S, inputs, settings), inputs, settings)
    return LossOutputs(loss, {"clip/share": float(stopped_S.sum()), **sums})


GRPO = Algorithm(group_normalised, grpo_loss)
