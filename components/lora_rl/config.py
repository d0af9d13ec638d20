"""Settings of the lora_rl step."""

from tuneloop.training.settings import RlSettings


class LoraRlConfig(RlSettings):
    """LoRA reinforcement learning from verifiable rewards; `[lora]` and `[task]` say of what and on what."""
