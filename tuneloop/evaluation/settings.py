"""Settings of the gate."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tuneloop.config import StrictModel

COST_METRICS = ("completion_tokens", "truncated_share")  # a rise is what hurts; rewards' means are hurt by a fall


class GuardSettings(StrictModel):
    """A metric (mean over the greedy answers) that must not get worse than the reference model's.

    The reference is the incumbent, or the base while there is no incumbent. Limits are in the metric's own unit: a
    reward's mean in [0, 1], tokens for `completion_tokens`, a share in [0, 1] for `truncated_share`.
    """

    metric: str = Field(min_length=1)  # a reward's name, "completion_tokens" or "truncated_share"
    max_drop: Annotated[float, Field(ge=0.0)] = 0.02  # of a reward's mean
    max_rise: Annotated[float, Field(ge=0.0)] | None = None  # of any metric; the only limit of the last two

    @model_validator(mode="after")
    def _cost_has_a_limit(self) -> "GuardSettings":
        if self.metric in COST_METRICS and self.max_rise is None:
            raise ValueError(f"a guard on {self.metric} needs `max_rise`: a rise of it is what hurts")
        return self


class GateSettings(StrictModel):
    """The candidate is promoted only if it beats base and incumbent on the primary metric, and no guard falls."""

    primary: Literal["accuracy", "pass_at_1"] = "accuracy"
    significance: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01  # p-value of the exact paired test, one-sided
    margin: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # the difference must be larger than this
    guards: tuple[GuardSettings, ...] = ()
