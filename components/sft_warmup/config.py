"""Settings of the sft_warmup step."""

from tuneloop.training.settings import SftSettings


class SftWarmupConfig(SftSettings):
    """Supervised warm-up before RL; `[lora]` says which adapter is trained."""
