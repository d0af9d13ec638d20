"""Settings of the two training loops."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.config import StrictModel
from tuneloop.rollout.settings import EngineSettings
from tuneloop.settings import OptimizerSettings, PositiveInt, SamplingSettings, Share

# From SIGTERM until a running update is abandoned: less than the 30 s after which Kubernetes kills a pod.
StopGrace = Annotated[float, Field(ge=0.0, le=86_400.0)]


class RankScheduleSettings(StrictModel):
    """Ranks that follow how the spectrum of each module's B·A is used, within a budget; see docs/lora.md."""

    kind: Literal["off", "spectrum"] = "off"
    every: PositiveInt = 10  # updates between two changes
    initial: Annotated[int, Field(ge=0, le=4096)] = 0  # mean rank a module at first; 0: that of the warm-up's adapter
    final: Annotated[int, Field(ge=0, le=4096)] = 0  # mean rank a module that the budget ends at; 0: initial
    budget: Literal["rank", "parameters"] = "parameters"  # what stays within the budget: ranks, or ranks times sizes
    anneal: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5  # share of the run after which the budget is at `final`
    min_rank: PositiveInt = 1
    max_rank: Annotated[int, Field(ge=0, le=4096)] = 0  # 0: twice the largest of the other ranks
    growth: Annotated[int, Field(ge=0, le=4096)] = 4  # most that a module's rank rises by at a change

    @model_validator(mode="after")
    def _bounds_fit(self) -> "RankScheduleSettings":
        for name in ("initial", "final", "max_rank"):
            if 0 < getattr(self, name) < self.min_rank:
                raise ValueError(f"{name} = {getattr(self, name)} is below min_rank = {self.min_rank}")
        if 0 < self.max_rank < max(self.initial, self.final):
            raise ValueError("max_rank is below the mean rank that the budget allows: raise it or leave it out")
        return self

    def largest(self, start: int) -> int:
        """The largest rank that a module may reach in the run: what a rollout engine plans for.

        Args:
            start: the largest rank at the start, `LoraSettings.largest_rank`.
        """
        if self.kind == "off":
            return start
        return max(start, self.max_rank or 2 * max(start, self.initial, self.final))


class DistributedSettings(StrictModel):
    """Several processes on one machine, and what DeepSpeed's ZeRO spreads over them. Decides no result."""

    processes: PositiveInt | Literal["auto"] = "auto"  # auto: one a GPU, one on a CPU
    zero_stage: Literal[1, 2, 3] = 2  # spread: 1 masters and moments, 2 gradients too, 3 parameters too
    offload_optimizer: bool = False  # masters and moments in host memory
    offload_parameters: bool = False  # stage 3: parameters in host memory while they are not computed with
    layered_summon: bool = True  # stage 3: the adapter is put together a module at a time for the sync, else at once
    whole_below: Annotated[int, Field(ge=0)] = 100_000  # stage 3: parameters of at most so many elements are not spread
    bucket_elements: Annotated[int, Field(ge=1_000)] = 50_000_000  # of one exchange: more is faster and needs memory
    timeout_seconds: PositiveInt = 7200  # an exchange that takes longer ends the step: a process is lost

    @model_validator(mode="after")
    def _only_what_is_spread_is_offloaded(self) -> "DistributedSettings":
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage = 3, which spreads the parameters")
        return self

    @property
    def offloads(self) -> bool:
        """Whether anything is offloaded, which DeepSpeed does even for one process."""
        return self.offload_optimizer or self.offload_parameters


class RlSettings(StrictModel):
    """LoRA reinforcement learning from verifiable rewards."""

    mode: Literal["lora", "full"] = "lora"  # full: train every weight, as a reference to compare LoRA with
    updates: PositiveInt = 100  # rollout rounds
    prompts_per_update: PositiveInt = 32
    group_size: Annotated[int, Field(ge=2, le=1024)] = 8  # completions a prompt
    sampling: SamplingSettings = SamplingSettings()
    algorithm: AlgorithmSettings = AlgorithmSettings()
    engine: EngineSettings = EngineSettings()
    distributed: DistributedSettings = DistributedSettings()
    gradient_checkpointing: bool = False  # keep a layer's input alone and compute the rest again in the backward pass
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=1e-4)
    rank_schedule: RankScheduleSettings = RankScheduleSettings()
    micro_batch_tokens: Annotated[int, Field(ge=8)] = 8192  # packed tokens of one forward pass
    validate_every: PositiveInt = 10  # updates
    validation_prompts: PositiveInt = 128
    checkpoint_every: PositiveInt = 10  # updates
    keep_checkpoints: PositiveInt = 2
    stop_grace_seconds: StopGrace = 20.0
    kept_prompts: Annotated[int, Field(ge=0, le=64)] = 4  # validation prompts whose completions the report shows
    max_truncated_share: Share = 1.0  # stop as a mistake when more completions than this are cut off at the limit

    @model_validator(mode="after")
    def _whole_weights_are_shared_with_the_engine(self) -> "RlSettings":
        if self.mode == "full" and self.distributed.zero_stage == 3:
            raise ValueError('mode = "full" shares its weights with the engine: use distributed.zero_stage 1 or 2')
        return self

    @model_validator(mode="after")
    def _processes_wait_longer_than_their_engine(self) -> "RlSettings":
        shared = self.engine.kind == "vllm" and self.engine.tensor_parallel_size > 1
        if shared and self.distributed.timeout_seconds <= self.engine.timeout_seconds:
            raise ValueError("distributed.timeout_seconds must exceed engine.timeout_seconds: processes wait for one "
                             "of them, which has the engine, also while that is started again")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _rollouts_explore(self) -> "RlSettings":
        if self.sampling.temperature == 0.0:
            raise ValueError("sampling.temperature 0 gives equal completions in a group, so no advantage: use 1.0")
        if self.algorithm.minibatches > self.prompts_per_update:
            raise ValueError("algorithm.minibatches cannot exceed prompts_per_update")
        return self

    @model_validator(mode="after")
    def _ranks_are_of_adapters(self) -> "RlSettings":
        if self.mode == "full" and self.rank_schedule.kind != "off":
            raise ValueError('rank_schedule changes the ranks of an adapter, and mode = "full" trains none')
        return self


class SftSettings(StrictModel):
    """Supervised warm-up: enough for RL to find rewarded completions, and no more."""

    mode: Literal["lora", "full"] = "lora"
    updates: Annotated[int, Field(ge=0)] = 50  # 0: RL starts from a fresh adapter
    examples_per_update: PositiveInt = 64
    micro_batch_tokens: Annotated[int, Field(ge=8)] = 8192  # packed tokens of one forward pass
    gradient_checkpointing: bool = False  # keep a layer's input alone and compute the rest again in the backward pass
    optimizer: OptimizerSettings = OptimizerSettings(learning_rate=3e-4, schedule="linear", warmup_updates=5)
    validate_every: PositiveInt = 10  # updates
    validation_examples: PositiveInt = 128
    checkpoint_every: PositiveInt = 50  # updates
    stop_grace_seconds: StopGrace = 20.0
