"""Group sequence policy optimisation: the ratio belongs to the completion, as the reward does.

Zheng et al., 2025 (arXiv:2507.18071), equations 5 to 7.

Legend: S scored tokens, B completions.
"""

import torch

from tuneloop.algorithms.advantages import group_normalised
from tuneloop.algorithms.aggregation import aggregate
from tuneloop.algorithms.correction import importance_weights
from tuneloop.algorithms.kl import with_kl
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import Algorithm, LossInputs, LossOutputs


def gspo_loss(inputs: LossInputs, settings: AlgorithmSettings) -> LossOutputs:
    """-w min(s A, clip(s, 1 - low, 1 + high) A) + beta KL, with s = exp(mean over the completion's tokens of log r).

    Args:
        inputs: tokens of one micro-batch; all tokens of a completion have the same advantage.
    """
    owner_S, advantages_B = inputs.completion_of_S, inputs.mean_B(inputs.advantages_S)
    ratio_B = inputs.mean_B(inputs.logprobs_S - inputs.old_logprobs_S).exp()
    clipped_B = ratio_B.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    free_B = ratio_B * advantages_B
    gain_B = torch.minimum(free_B, clipped_B * advantages_B)
    stopped_B = gain_B.detach() < free_B.detach()
    weight_S, sums = importance_weights(inputs, settings)
    # Every token carries its completion's gain: the sequence mean gives it back once.
    loss_S = with_kl(-weight_S * gain_B[owner_S], inputs, settings)
    return LossOutputs(
        aggregate(loss_S, inputs, settings), {"clip/share": float((stopped_B * inputs.lengths_B).sum()), **sums}
    )


GSPO = Algorithm(group_normalised, gspo_loss)
