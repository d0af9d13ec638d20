"""Turning per-token losses into one number whose parts add up over micro-batches."""

import torch

from tuneloop.algorithms.types import LossInputs


def aggregate(loss_S: torch.Tensor, inputs: LossInputs, how: str) -> torch.Tensor:
    """The minibatch's loss, as this micro-batch's share of it.

    Args:
        how: "token_mean": every token of the minibatch weighs the same; "sequence_mean": the mean over completions
            of each completion's mean over its tokens.
    """
    if how == "token_mean":
        return loss_S.sum() / inputs.token_total
    assert how == "sequence_mean"
    weight_S = 1.0 / inputs.lengths_B[inputs.completion_of_S]
    return (loss_S * weight_S).sum() / inputs.completion_total
