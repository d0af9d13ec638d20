"""Settings of the lora_rl step."""

from pydantic import model_validator

from components.lora_rl.trainjob.settings import LauncherSettings
from tuneloop.rollout.settings import logprobs_mode
from tuneloop.training.settings import RlSettings


class LoraRlConfig(RlSettings):
    """LoRA reinforcement learning from verifiable rewards; `[lora]` and `[task]` say of what and on what."""

    distributed: LauncherSettings = LauncherSettings()  # pyright: ignore[reportIncompatibleVariableOverride] - frozen

    @model_validator(mode="after")
    def _the_engine_can_do_it(self) -> "LoraRlConfig":
        if self.engine.kind == "vllm":
            logprobs_mode(self.sampling)
            if self.mode == "full":
                raise ValueError('mode = "full" trains the weights that the engine samples from, which only the '
                                 'built-in engine shares: set engine.kind = "torch"')  # fmt: skip
        return self

    @model_validator(mode="after")
    def _nodes_can_do_it(self) -> "LoraRlConfig":
        if self.distributed.launcher != "trainjob":
            return self
        processes, size = self.distributed.processes_per_node, self.engine.tensor_parallel_size
        if self.rank_schedule.kind != "off" and processes * self.distributed.trainjob.nodes > 1:
            raise ValueError('rank_schedule changes ranks in one process only: set distributed.launcher = "inline"')
        if self.engine.kind == "vllm" and processes % size:
            raise ValueError(f"engine.tensor_parallel_size = {size} does not divide the {processes} processes of a "
                             "node: change it or distributed.trainjob.gpus")  # fmt: skip
        return self
