"""Settings of the merge_adapter step."""

from typing import Annotated, Literal

from pydantic import Field

from tuneloop.config import StrictModel


class MergeAdapterConfig(StrictModel):
    """How the adapter is folded into the base, and how far the merged model may differ."""

    max_shard_bytes: Annotated[int, Field(ge=1_000_000)] = 2_000_000_000
    dtype: Literal["base", "bfloat16", "float16", "float32"] = "base"  # of the merged weights
    tolerance: Annotated[float, Field(gt=0.0)] = 0.005  # mean KL (nats) of merged against base + adapter
    probe_prompts: Annotated[int, Field(ge=1, le=256)] = 8
