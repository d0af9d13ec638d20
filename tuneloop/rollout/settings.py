"""Settings of the rollout engines. This module does not import torch."""

from typing import Annotated, Literal

from pydantic import Field

from tuneloop.config import StrictModel
from tuneloop.settings import PositiveInt


class EngineSettings(StrictModel):
    """The rollout engine."""

    kind: Literal["torch"] = "torch"
    max_sequences: PositiveInt = 512  # sampled at once
    canary_tolerance: Annotated[float, Field(ge=0.0)] = 0.0  # nats, mean gap of trainer and engine; 0: by dtype
