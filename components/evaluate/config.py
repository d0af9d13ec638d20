"""Settings of the evaluate step; the gate's are in `tuneloop/evaluation/settings.py`."""

from typing import Annotated

from pydantic import Field, model_validator

from tuneloop.config import StrictModel
from tuneloop.evaluation.settings import GateSettings, HarnessSettings
from tuneloop.rollout.settings import EngineSettings, logprobs_mode
from tuneloop.settings import PositiveInt, SamplingSettings, Temperature


class EvaluationSampling(SamplingSettings):
    """How pass@k's completions are drawn: a little cooler than a rollout."""

    temperature: Temperature = 0.7


class EvaluateConfig(StrictModel):
    """Which held-out prompts, how they are answered, and what counts as better."""

    prompts: PositiveInt = 512  # at most; the test split's first ones by id
    min_prompts: PositiveInt = 64  # fewer held-out prompts than this are refused
    samples: PositiveInt = 4  # completions a prompt for pass@k
    pass_k: tuple[PositiveInt, ...] = (1, 4)
    sampling: EvaluationSampling = EvaluationSampling()
    confidence: Annotated[float, Field(gt=0.5, lt=1.0)] = 0.95
    max_sequences: PositiveInt = 512  # decoded at once
    engine: EngineSettings = EngineSettings()  # kind = "vllm": for a model that one GPU cannot hold
    gate: GateSettings = GateSettings()
    harness: HarnessSettings | None = None  # needs the extra `harness`

    @model_validator(mode="after")
    def _counts_fit_each_other(self) -> "EvaluateConfig":
        if max(self.pass_k, default=1) > self.samples:
            raise ValueError(f"pass_k holds {max(self.pass_k)}, but only samples = {self.samples} are drawn")
        if self.harness and self.engine.kind != "torch":
            raise ValueError('harness needs the built-in engine: set engine.kind = "torch", or leave the harness out')
        if self.engine.max_sequences != EngineSettings().max_sequences:
            raise ValueError(
                "engine.max_sequences is the rollouts'; the evaluation decodes evaluate.max_sequences at once"
            )
        if self.engine.kind == "vllm":
            logprobs_mode(self.sampling)
        if self.min_prompts > self.prompts:
            raise ValueError(f"min_prompts = {self.min_prompts} exceeds prompts = {self.prompts}: no run could pass")
        return self
