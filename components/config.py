"""The one config of a run: shared sections and one section a step."""

from pathlib import Path

from pydantic import Field, model_validator

from components.check.config import CheckConfig
from components.cluster_config import ClusterConfig
from components.data_prep.config import DataPrepConfig
from components.evaluate.config import EvaluateConfig
from components.lora_rl.config import LoraRlConfig
from components.merge_adapter.config import MergeAdapterConfig
from components.promote.config import PromoteConfig
from components.sft_warmup.config import SftWarmupConfig
from tuneloop.config import StrictModel, load_config
from tuneloop.settings import LoraSettings, ModelSettings, RetrainSettings, TaskSettings
from tuneloop.tracking.settings import TrackingSettings


class RunConfig(StrictModel):
    """Everything that decides what a run computes, and `cluster`, which says where. Where it writes is not in here."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    model: ModelSettings
    task: TaskSettings
    lora: LoraSettings = LoraSettings()
    check: CheckConfig = CheckConfig()
    data_prep: DataPrepConfig
    sft_warmup: SftWarmupConfig = SftWarmupConfig()
    lora_rl: LoraRlConfig = LoraRlConfig()
    merge_adapter: MergeAdapterConfig = MergeAdapterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()
    retrain: RetrainSettings = RetrainSettings()
    tracking: TrackingSettings = TrackingSettings()
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)  # its images may come from the environment

    @model_validator(mode="after")
    def _algorithm_follows_the_task(self) -> "RunConfig":
        algorithm = self.lora_rl.algorithm.for_task(self.task.max_new_tokens)
        object.__setattr__(self, "lora_rl", self.lora_rl.model_copy(update={"algorithm": algorithm}))
        return self

    @model_validator(mode="after")
    def _the_plan_is_for_all_nodes(self) -> "RunConfig":
        distributed = self.lora_rl.distributed
        gpus = distributed.trainjob.nodes * distributed.trainjob.gpus
        if distributed.launcher == "trainjob" and self.check.gpu and gpus not in (0, self.check.gpus):
            raise ValueError(f"check.gpus = {self.check.gpus} is what the run is planned for, but the TrainJob has "
                             f"{gpus} (lora_rl.distributed.trainjob.nodes * gpus): make them equal")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _overlong_buffer_fits(self) -> "RunConfig":
        if self.lora_rl.algorithm.overlong_buffer > self.task.max_new_tokens:
            raise ValueError(
                f"lora_rl.algorithm.overlong_buffer = {self.lora_rl.algorithm.overlong_buffer} exceeds "
                f"task.max_new_tokens = {self.task.max_new_tokens}: lower it"
            )
        return self

    @model_validator(mode="after")
    def _lengths_fit_the_context(self) -> "RunConfig":
        needed = self.data_prep.max_prompt_tokens + self.task.max_new_tokens
        if needed > self.model.max_length:
            raise ValueError(
                f"data_prep.max_prompt_tokens + task.max_new_tokens = {needed} exceeds model.max_length = "
                f"{self.model.max_length}: raise model.max_length or lower one of the two"
            )
        return self


def load_run_config(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """`tuneloop.config.load_config` for a whole run."""
    return load_config(RunConfig, path, overrides)
