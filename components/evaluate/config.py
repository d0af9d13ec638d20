"""Settings of the evaluate step and of the gate."""

from typing import Annotated, Literal

from pydantic import Field

from tuneloop.config import StrictModel
from tuneloop.settings import PositiveInt, SamplingSettings


class GuardSettings(StrictModel):
    """A metric that must not get worse than the reference model's by more than `max_drop`."""

    metric: str = Field(min_length=1)  # a reward's name, "completion_tokens" or "truncated_share"
    max_drop: Annotated[float, Field(ge=0.0)] = 0.02
    max_rise: Annotated[float, Field(ge=0.0)] | None = None


class GateSettings(StrictModel):
    """The candidate is promoted only if it beats base and incumbent on the primary metric, and no guard falls."""

    primary: Literal["accuracy", "pass_at_1"] = "accuracy"
    significance: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01  # p-value of the exact paired test, one-sided
    margin: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # the difference must be larger than this
    guards: tuple[GuardSettings, ...] = ()


class EvaluateConfig(StrictModel):
    """Which held-out prompts, how they are answered, and what counts as better."""

    prompts: PositiveInt = 512  # at most; the test split's first ones by id
    min_prompts: PositiveInt = 64  # fewer held-out prompts than this are refused
    samples: PositiveInt = 4  # completions a prompt for pass@k
    pass_k: tuple[PositiveInt, ...] = (1, 4)
    sampling: SamplingSettings = SamplingSettings(temperature=0.7)
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    max_sequences: PositiveInt = 512  # decoded at once
    gate: GateSettings = GateSettings()
