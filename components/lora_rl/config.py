"""Settings of the lora_rl step."""

from pydantic import model_validator

from tuneloop.rollout.settings import logprobs_mode
from tuneloop.training.settings import RlSettings


class LoraRlConfig(RlSettings):
    """LoRA reinforcement learning from verifiable rewards; `[lora]` and `[task]` say of what and on what."""

    @model_validator(mode="after")
    def _the_engine_can_do_it(self) -> "LoraRlConfig":
        if self.engine.kind == "vllm":
            logprobs_mode(self.sampling)
            if self.mode == "full":
                raise ValueError('mode = "full" trains the weights that the engine samples from, which only the '
                                 'built-in engine shares: set engine.kind = "torch"')  # fmt: skip
        return self
