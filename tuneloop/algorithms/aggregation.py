"""Turning per-token losses into one number whose parts add up over micro-batches."""

import torch

from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import LossInputs


def aggregate(loss_S: torch.Tensor, inputs: LossInputs, settings: AlgorithmSettings) -> torch.Tensor:
    """The minibatch's loss, as this micro-batch's share of it.

    `settings.aggregation` is one of
    token_mean: every token of the minibatch weighs the same (DAPO, arXiv:2503.14476);
    sequence_mean: the mean over completions of each completion's mean over its tokens (GRPO's equation 3);
    sequence_mean_sum_norm: the mean over completions of each completion's sum over its tokens, divided by a constant
    `length_norm`, so that a token weighs the same in short and in long completions (Dr. GRPO, arXiv:2503.20783).
    """
    if settings.aggregation == "token_mean":
        return loss_S.sum() / inputs.token_total
    if settings.aggregation == "sequence_mean":
        weight_S = 1.0 / inputs.lengths_B[inputs.completion_of_S]
        return (loss_S * weight_S).sum() / inputs.completion_total
    assert settings.length_norm is not None
    return loss_S.sum() / (settings.length_norm * inputs.completion_total)
