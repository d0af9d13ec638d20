"""Settings of the two training loops."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.config import StrictModel
from tuneloop.rollout.settings import EngineSettings
from tuneloop.settings import OptimizerSettings, PositiveInt, SamplingSettings, Share


class RlSettings(StrictModel):
    """LoRA reinforcement learning from verifiable rewards."""

    updates: PositiveInt = 100  # rollout rounds
    prompts_per_update: PositiveInt = 32
    group_size: Annotated[int, Field(ge=2, le=1024)] = 8  # completions a prompt
    sampling: SamplingSettings = SamplingSettings()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    engine: EngineSettings = EngineSettings()
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=1e-4)
    micro_batch_tokens: Annotated[int, Field(ge=8)] = 8192  # packed tokens of one forward pass
    validate_every: PositiveInt = 10  # updates
    validation_prompts: PositiveInt = 128
    checkpoint_every: PositiveInt = 10  # updates
    keep_checkpoints: PositiveInt = 2
    kept_prompts: Annotated[int, Field(ge=0, le=64)] = 4  # validation prompts whose completions the report shows
    max_truncated_share: Share = 1.0  # stop as a mistake when more completions than this are cut off at the limit

    @model_validator(mode="after")
    def _rollouts_explore(self) -> "RlSettings":
        if self.sampling.temperature == 0.0:
            raise ValueError("sampling.temperature 0 gives equal completions in a group, so no advantage: use 1.0")
        if self.algorithm.minibatches > self.prompts_per_update:
            raise ValueError("algorithm.minibatches cannot exceed prompts_per_update")
        return self


class SftSettings(StrictModel):
    """Supervised warm-up: enough for RL to find rewarded completions, and no more."""

    mode: Literal["lora", "full"] = "lora"
    updates: Annotated[int, Field(ge=0)] = 50  # 0: RL starts from a fresh adapter
    examples_per_update: PositiveInt = 64
    micro_batch_tokens: Annotated[int, Field(ge=8)] = 8192  # packed tokens of one forward pass
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=3e-4, schedule="linear", warmup_updates=5)
    validate_every: PositiveInt = 10  # updates
    validation_examples: PositiveInt = 128
    checkpoint_every: PositiveInt = 50  # updates
