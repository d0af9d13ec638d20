"""Settings that several steps share: the model, the task and its rewards, LoRA, the optimiser, sampling.

Settings that belong to one step alone are in that step's `components/<step>/config.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from tuneloop.config import StrictModel

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def _number_or_auto(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, str) and value != "auto":
        raise ValueError('give a number or "auto"')
    return value if value == "auto" else validate(value)


# Numbers to whoever computes with them: a step puts `tuneloop.models.recommend`'s choice in the place of "auto" first.
_AUTO = (WrapValidator(_number_or_auto), PlainSerializer(lambda value: value))
AutoRank = Annotated[int, Field(ge=1, le=4096), *_AUTO]
AutoRate = Annotated[float, Field(gt=0.0, le=1.0), *_AUTO]


def _zero_or_not_tiny(temperature: float) -> float:
    if 0.0 < temperature < 1e-3:
        raise ValueError("use 0 for greedy decoding, or at least 0.001: logits divided by less overflow")
    return temperature


Temperature = Annotated[float, Field(ge=0.0, le=10.0), AfterValidator(_zero_or_not_tiny)]


class ModelSettings(StrictModel):
    """The base model: where it comes from, the precision it is held in, the longest sequence that it may see."""

    uri: str = Field(min_length=1)
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 1024  # prompt + completion, tokens


class RewardSettings(StrictModel):
    """One reward: scores in [0, 1] for a completion; the rewards' weighted sum is what RL maximises."""

    kind: Literal["exact", "numeric", "symbolic", "format", "reasoning_gym", "python"]
    name: str = Field(default="", pattern=r"^[a-z0-9_]*$")  # defaults to the kind
    weight: Annotated[float, Field(ge=-100.0, le=100.0)] = 1.0
    pattern: str = ""  # format: a regular expression that the whole completion must match
    function: str = ""  # python: a dotted name, `package.module:function`

    @model_validator(mode="before")
    @classmethod
    def _name_defaults_to_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name"):
            return {**data, "name": data.get("kind", "")}
        return data

    @model_validator(mode="after")
    def _options_fit_the_kind(self) -> "RewardSettings":
        if self.kind == "format" and not self.pattern:
            raise ValueError("a format reward needs `pattern`")
        if self.kind == "python" and ":" not in self.function:
            raise ValueError("a python reward needs `function` written as package.module:function")
        return self


class TaskSettings(StrictModel):
    """What is asked and how an answer is judged."""

    system_prompt: str = ""
    max_new_tokens: Annotated[int, Field(ge=1, le=131_072)] = 256
    rewards: Annotated[tuple[RewardSettings, ...], Field(min_length=1)] = (RewardSettings(kind="exact"),)

    @field_validator("rewards")
    @classmethod
    def _names_are_unique(cls, rewards: tuple[RewardSettings, ...]) -> tuple[RewardSettings, ...]:
        names = [reward.name for reward in rewards]
        if len(set(names)) < len(names):
            raise ValueError(f"two rewards share a name ({', '.join(names)}); give one a `name` of its own")
        return rewards

    @property
    def accuracy_reward(self) -> str:
        """The name of the reward that decides whether a completion is correct: the first one."""
        return self.rewards[0].name


class LoraSettings(StrictModel):
    """The adapter. The update to a target weight is `scaling * B @ A`; see Hu et al., 2021 (arXiv:2106.09685)."""

    rank: AutoRank = 32  # "auto": by the model's size, see tuneloop/models/recommend.py
    alpha: Annotated[float, Field(gt=0.0, le=65_536.0)] = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # in the warm-up; RL trains the very policy that samples
    rslora: bool = False  # scaling alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732)
    init: Literal["kaiming", "gaussian", "orthogonal", "svd"] = "kaiming"  # of A; B starts at 0
    start_from: str = ""  # an adapter that the warm-up continues: a folder, s3://…, or registry:<alias>
    target_modules: Literal["all-linear", "attention", "mlp"] | tuple[str, ...] = "all-linear"
    exclude_modules: tuple[str, ...] = ()
    rank_pattern: dict[str, PositiveInt] = {}  # module-name suffix or regex -> rank
    alpha_pattern: dict[str, Annotated[float, Field(gt=0.0)]] = {}

    @property
    def largest_rank(self) -> int:
        """Of all modules; "auto" being resolved."""
        return max(self.rank, *self.rank_pattern.values(), 1)


class RetrainSettings(StrictModel):
    """What a run does that is repeated on a schedule. A source's uri may hold {day} or {day:%Y/%m/%d}."""

    window_days: Annotated[int, Field(ge=1, le=3660)] = 1  # whole days (UTC) before the tick that {day} stands for
    skip_unchanged: bool = False  # nothing is trained while the data is what the incumbent was trained on
    warm_start: bool = False  # the warm-up continues the incumbent's adapter; afresh while there is none


class OptimizerSettings(StrictModel):
    """AdamW with decoupled weight decay and a learning rate that warms up linearly."""

    learning_rate: AutoRate  # "auto": by the model's size and the method, see tuneloop/models/recommend.py
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up; linear and cosine end at 0
    warmup_updates: Annotated[int, Field(ge=0)] = 0  # optimiser steps, of which RL makes `minibatches` an update
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    epsilon: Annotated[float, Field(gt=0.0, le=1e-2)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0


class SamplingSettings(StrictModel):
    """How completions are drawn. temperature 0 is greedy."""

    temperature: Temperature = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: off
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # 1: off
