"""Settings of the sft_warmup step."""

from typing import Annotated, Literal

from pydantic import Field

from tuneloop.config import StrictModel
from tuneloop.settings import OptimizerSettings, PositiveInt


class SftWarmupConfig(StrictModel):
    """Supervised warm-up: enough for RL to find rewarded completions, and no more."""

    mode: Literal["lora", "full"] = "lora"
    updates: Annotated[int, Field(ge=0)] = 50  # 0: RL starts from a fresh adapter
    examples_per_update: PositiveInt = 64
    micro_batch_tokens: Annotated[int, Field(ge=8)] = 8192  # packed tokens of one forward pass
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=3e-4, schedule="linear", warmup_updates=5)
    validate_every: PositiveInt = 10  # updates
    validation_examples: PositiveInt = 128
    checkpoint_every: PositiveInt = 50  # updates
