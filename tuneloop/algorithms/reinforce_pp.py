"""REINFORCE++: rewards compared over the whole batch, with or without a group baseline.

Hu et al., 2025 (arXiv:2501.03262). KL belongs in every token's reward without the baseline, in the loss (k2) with it.
"""

from tuneloop.algorithms.advantages import batch_normalised, centred, rewards_to_go
from tuneloop.algorithms.grpo import grpo_loss
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import AdvantageInputs, Advantages, Algorithm


def reinforce_pp_advantages(inputs: AdvantageInputs, settings: AlgorithmSettings) -> Advantages:
    """The reward to go of every token, normalised over all tokens of the rollout."""
    return Advantages(batch_normalised(rewards_to_go(inputs)))


def reinforce_pp_baseline_advantages(inputs: AdvantageInputs, settings: AlgorithmSettings) -> Advantages:
    """R - mean of the group, normalised over all completions of the rollout.

    The mean over completions is 0 already, so a group without spread keeps exactly 0.
    """
    centred_NG = centred(inputs.returns_NG())
    normalised_NG = batch_normalised(centred_NG)
    return Advantages(inputs.spread(normalised_NG.masked_fill(centred_NG == 0.0, 0.0)))


REINFORCE_PP = Algorithm(reinforce_pp_advantages, grpo_loss)
REINFORCE_PP_BASELINE = Algorithm(reinforce_pp_baseline_advantages, grpo_loss)
