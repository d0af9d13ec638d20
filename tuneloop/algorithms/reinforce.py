"""The plain policy gradient, without a baseline and without a ratio.

Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992.
"""

from tuneloop.algorithms.advantages import rewards_to_go
from tuneloop.algorithms.aggregation import aggregate
from tuneloop.algorithms.correction import importance_weights
from tuneloop.algorithms.kl import with_kl
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import AdvantageInputs, Advantages, Algorithm, LossInputs, LossOutputs


def reinforce_advantages(inputs: AdvantageInputs, settings: AlgorithmSettings) -> Advantages:
    """The reward of the completion, less the KL penalties of the token and all later ones."""
    return Advantages(rewards_to_go(inputs))


def reinforce_loss(inputs: LossInputs, settings: AlgorithmSettings) -> LossOutputs:
    """-w A log pi + beta KL, with w the importance weight for the engine's numerics.

    Args:
        inputs: tokens of one micro-batch.
    """
    weight_S, sums = importance_weights(inputs, settings)
    loss_S = with_kl(-weight_S * inputs.advantages_S * inputs.logprobs_S, inputs, settings)
    return LossOutputs(aggregate(loss_S, inputs, settings), sums)


REINFORCE = Algorithm(reinforce_advantages, reinforce_loss)
