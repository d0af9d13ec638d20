"""Settings of the policy-gradient objective. This module does not import torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tuneloop.config import StrictModel
from tuneloop.settings import PositiveInt


class AlgorithmSettings(StrictModel):
    """The policy-gradient objective; the formulas are in `tuneloop/algorithms/`."""

    name: Literal["grpo"] = "grpo"
    clip_low: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    clip_high: Annotated[float, Field(gt=0.0, le=10.0)] = 0.2
    kl_coefficient: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0  # of the KL to the reference, in the loss
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    minibatches: PositiveInt = 1  # optimiser steps a rollout; 1 is strictly on-policy
    importance_cap: Annotated[float, Field(ge=0.0)] = 2.0  # truncated importance sampling; 0: off

    @model_validator(mode="after")
    def _estimator_has_a_gradient(self) -> "AlgorithmSettings":
        if self.kl_coefficient > 0 and self.kl_estimator == "k1":
            raise ValueError("k1 in the loss has a gradient of zero expectation and restrains nothing: use k2 or k3")
        return self
