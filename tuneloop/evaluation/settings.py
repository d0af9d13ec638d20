"""Settings of the gate, and of lm-evaluation-harness."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tuneloop.config import StrictModel
from tuneloop.settings import PositiveInt

COST_METRICS = ("completion_tokens", "truncated_share")  # a rise is what hurts; rewards' means are hurt by a fall


class GuardSettings(StrictModel):
    """A metric (mean over the greedy answers) that must not get worse than the reference model's.

    The reference is the incumbent, or the base while there is no incumbent. Limits are in the metric's own unit: a
    reward's mean in [0, 1], tokens for `completion_tokens`, a share in [0, 1] for `truncated_share`.
    """

    # a reward's name, "completion_tokens", "truncated_share", or "<task>/<metric>" of `evaluate.harness`
    metric: str = Field(min_length=1)
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


class HarnessSettings(StrictModel):
    """Tasks of lm-evaluation-harness on base, candidate and incumbent, beside our own held-out prompts."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]  # names of tasks, groups or tags
    limit: PositiveInt | None = None  # first documents of each task only
    num_fewshot: Annotated[int, Field(ge=0)] | None = None  # None: the task's own
    include_path: str = ""  # a folder with task YAMLs of one's own
    chat_template: bool = False  # prompts as user messages; lm-eval's own default is plain text
    max_length: Annotated[int, Field(ge=16)] = 4096  # tokens; longer prompts lose their beginning
    batch_tokens: Annotated[int, Field(ge=16)] = 8192  # tokens of one forward pass
