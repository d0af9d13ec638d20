"""Settings of the policy-gradient objective. This module does not import torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tuneloop.algorithms.traits import SPECIAL_SETTINGS, TRAITS, AlgorithmName
from tuneloop.config import StrictModel
from tuneloop.settings import PositiveInt, Share


class AlgorithmSettings(StrictModel):
    """The policy-gradient objective; the formulas are in `tuneloop/algorithms/` and docs/algorithms.md.

    The defaults written here are GRPO's; those of other algorithms are in `tuneloop/algorithms/traits.py`, and a
    resolved config shows the ones that hold.
    """

    name: AlgorithmName = "grpo"
    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2  # the ratio is held above 1 - clip_low
    clip_high: Annotated[float, Field(gt=0.0, le=100.0)] = 0.2  # and below 1 + clip_high
    dual_clip: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0  # most that a bad token can weigh; 0: off
    aggregation: Literal["token_mean", "sequence_mean", "sequence_mean_sum_norm"] = "token_mean"
    length_norm: PositiveInt | None = None  # tokens that sequence_mean_sum_norm divides by; task.max_new_tokens
    minibatches: PositiveInt = 1  # optimiser steps a rollout; 1 is strictly on-policy

    kl_coefficient: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0  # of the KL to the reference
    kl_in: Literal["loss", "reward"] = "loss"
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_target: Annotated[float, Field(ge=0.0, le=100.0)] = 0.0  # nats a token to steer the coefficient to; 0: fixed
    kl_horizon: PositiveInt = 10_000  # completions in which the steered coefficient can change by a fifth

    correction: Literal["none", "token", "sequence", "icepop"] = "token"  # for the engine's numerics
    importance_cap: Annotated[float, Field(gt=0.0)] = 2.0  # of a token's or a completion's weight
    icepop_low: Annotated[float, Field(ge=0.0)] = 0.5  # tokens whose weight is outside of the two are masked
    icepop_high: Annotated[float, Field(gt=0.0)] = 5.0

    dynamic_sampling: bool = False  # replace groups whose rewards are all equal
    max_resample: PositiveInt = 4  # further rounds of sampling an update
    overlong_buffer: Annotated[int, Field(ge=0)] = 0  # last tokens before the limit that are penalised; 0: off
    overlong_penalty: Annotated[float, Field(ge=0.0, le=100.0)] = 1.0  # at the limit, taken from the reward

    gamma: Share = 1.0  # discount a token
    gae_lambda: Share = 1.0
    value_coefficient: Annotated[float, Field(gt=0.0, le=100.0)] = 0.5
    value_clip: Annotated[float, Field(gt=0.0, le=100.0)] = 0.2  # how far a value may move in one update

    flow_beta: Annotated[float, Field(gt=0.0, le=1000.0)] = 15.0
    flow_weight: Literal["clip", "cap"] = "clip"  # to 1 - clip_low … 1 + clip_high, or from above alone
    flow_weight_cap: Annotated[float, Field(gt=0.0)] = 10.0

    @model_validator(mode="before")
    @classmethod
    def _defaults_follow_the_name(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        traits = TRAITS.get(data.get("name", "grpo"))
        filled = {**(traits.defaults if traits else {}), **data}
        if "kl_estimator" not in data and filled.get("kl_in") == "reward":
            filled["kl_estimator"] = "k1"
        elif "kl_estimator" not in data and filled.get("kl_estimator") == "k1":
            filled["kl_estimator"] = "k3"
        return filled

    @model_validator(mode="after")
    def _fits_the_algorithm(self) -> "AlgorithmSettings":
        name, traits = self.name, TRAITS[self.name]
        for field in sorted(SPECIAL_SETTINGS - traits.reads):
            default = traits.defaults.get(field, type(self).model_fields[field].default)
            if getattr(self, field) != default:
                raise ValueError(f"{field} has no effect with {name}: leave it out")
        if traits.whole_completions and self.aggregation != "sequence_mean":
            raise ValueError(f"{name} weighs whole completions, not tokens: aggregation must be sequence_mean")
        if traits.whole_completions and self.correction in ("token", "icepop"):
            raise ValueError(f"{name} weighs whole completions, not tokens: correction must be sequence or none")
        if traits.learns_without_spread and self.dynamic_sampling:
            raise ValueError(f"{name} learns from groups whose rewards are all equal too: dynamic_sampling must be off")
        if not traits.has_ratio and self.minibatches > 1:
            raise ValueError(f"{name} has no ratio to the policy that sampled: minibatches must be 1 (or use cispo)")
        if self.length_norm is not None and self.aggregation != "sequence_mean_sum_norm":
            raise ValueError(f"length_norm has no effect with aggregation = {self.aggregation}: leave it out")
        if self.icepop_low >= self.icepop_high:
            raise ValueError("icepop_low must be below icepop_high, or every token is masked")
        return self

    @model_validator(mode="after")
    def _kl_restrains(self) -> "AlgorithmSettings":
        if self.kl_target > 0 and self.kl_coefficient == 0:
            raise ValueError("kl_target steers kl_coefficient: give it a value above 0 to start from")
        if self.kl_coefficient == 0:
            return self
        if TRAITS[self.name].holds_reference:
            raise ValueError(f"the reference is part of the objective of {self.name}: kl_coefficient must be 0")
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("k1 in the loss has a gradient of zero expectation and restrains nothing: use k2 or k3")
        if self.kl_in == "reward" and self.kl_estimator != "k1":
            raise ValueError(f"{self.kl_estimator} in the reward has not KL's gradient (its own is lost): use k1")
        return self

    @property
    def kl_in_loss(self) -> bool:
        """Whether the loss has a KL term."""
        return self.kl_coefficient > 0 and self.kl_in == "loss"

    @property
    def kl_in_reward(self) -> bool:
        """Whether every token's reward has a KL term."""
        return self.kl_coefficient > 0 and self.kl_in == "reward"

    def for_task(self, max_new_tokens: int) -> "AlgorithmSettings":
        """With the defaults that follow from the longest completion, where nothing was said."""
        changes: dict[str, Any] = {}
        if self.aggregation == "sequence_mean_sum_norm" and self.length_norm is None:
            changes["length_norm"] = max_new_tokens
        if self.name == "dapo" and "overlong_buffer" not in self.model_fields_set:
            changes["overlong_buffer"] = max_new_tokens // 5  # the paper's 4,096 of 20,480
        return self.model_copy(update=changes)
