"""GRPO done right: no division by the group's deviation nor by the completion's length.

Liu et al., 2025 (arXiv:2503.20783): both divisions bias GRPO, towards easy and hard prompts and towards long wrong
completions. Its aggregation is `sequence_mean_sum_norm`.
"""

from tuneloop.algorithms.advantages import centred
from tuneloop.algorithms.grpo import grpo_loss
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import AdvantageInputs, Advantages, Algorithm


def dr_grpo_advantages(inputs: AdvantageInputs, settings: AlgorithmSettings) -> Advantages:
    """R - mean of the group, the same for all tokens of a completion."""
    return Advantages(inputs.spread(centred(inputs.returns_NG())))


DR_GRPO = Algorithm(dr_grpo_advantages, grpo_loss)
