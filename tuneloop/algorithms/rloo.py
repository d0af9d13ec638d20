"""REINFORCE with the group's other completions as the baseline.

Kool et al., 2019; Ahmadian et al., 2024 (arXiv:2402.14740). The baseline does not depend on the completion that it is
taken from, so the gradient is unbiased.
"""

from tuneloop.algorithms.advantages import centred
from tuneloop.algorithms.grpo import grpo_loss
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import AdvantageInputs, Advantages, Algorithm


def rloo_advantages(inputs: AdvantageInputs, settings: AlgorithmSettings) -> Advantages:
    """R - mean of the others = (R - mean of the group) G / (G - 1), the same for all tokens of a completion."""
    returns_NG = inputs.returns_NG()
    size = returns_NG.shape[1]
    return Advantages(inputs.spread(centred(returns_NG) * (size / (size - 1))))


RLOO = Algorithm(rloo_advantages, grpo_loss)
