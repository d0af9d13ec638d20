"""Settings of the rollout engines. This module does not import torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tuneloop.config import StrictModel
from tuneloop.settings import PositiveInt, SamplingSettings

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for the largest rank that it must hold
CPU_KV_CACHE_BYTES = 4 << 30  # the most that is planned on a CPU, where vLLM cannot take what is left


class EngineSettings(StrictModel):
    """The rollout engine; docs/engines.md says when to use which."""

    kind: Literal["torch", "vllm"] = "torch"
    max_sequences: PositiveInt = 512  # sampled at once
    canary_tolerance: Annotated[float, Field(ge=0.0)] = 0.0  # nats, mean gap of trainer and engine; 0: by dtype
    # The rest is of vllm alone.
    tensor_parallel_size: PositiveInt = 1
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.4  # of the whole GPU; the trainer has the rest
    kv_cache_bytes: Annotated[int, Field(ge=0)] = 0  # 0: what the utilization leaves; on a CPU, what is needed
    enforce_eager: bool = False  # no CUDA graphs: starts faster, decodes slower; always so on a CPU
    sleep: bool = True  # weights to host memory while the trainer works (level 1); a CPU has nothing to give back
    use_shm: bool = False  # start from a copy of the base model in /dev/shm, made once and kept
    # adapter: vLLM applies it while it decodes; merged: vLLM reloads its weights with the adapter folded in;
    # auto: merged on a CPU with one adapter, where vLLM's LoRA kernels are very slow, else adapter.
    sync: Literal["auto", "adapter", "merged"] = "auto"
    max_restarts: Annotated[int, Field(ge=0, le=100)] = 3  # of an engine that dies, for one and the same call
    timeout_seconds: PositiveInt = 1800  # a start or a call that takes longer counts as a death

    @model_validator(mode="after")
    def _settings_are_of_the_kind(self) -> "EngineSettings":
        if self.kind == "torch":
            common = {"kind", "max_sequences", "canary_tolerance"}
            for name, field in type(self).model_fields.items():
                if name not in common and getattr(self, name) != field.default:
                    raise ValueError(f'{name} is of the vllm engine: set kind = "vllm" or leave it out')
        return self


def engine_rank(rank: int) -> int:
    """The smallest rank that vLLM can be started with and that holds adapters of `rank`.

    Raises:
        ValueError: vLLM holds no such rank.
    """
    for supported in VLLM_RANKS:
        if rank <= supported:
            return supported
    raise ValueError(f'rank {rank} exceeds the largest that vLLM holds ({VLLM_RANKS[-1]}): use sync = "merged", '
                     'kind = "torch" or a lower rank')  # fmt: skip


def cpu_cache_bytes(a_token: int, max_length: int, max_sequences: int) -> int:
    """The KV cache of vLLM on a CPU: what `max_sequences` of `max_length` need, within bounds.

    Args:
        a_token: bytes of one token's keys and values, over all layers.
    """
    a_sequence = a_token * (max_length + 64)  # whole blocks, and one that vLLM keeps free
    return max(2 * a_sequence, min(max_sequences * a_sequence, CPU_KV_CACHE_BYTES))


def logprobs_mode(sampling: SamplingSettings) -> str:
    """vLLM's name for log-probs at the sampling temperature, before top-k and top-p.

    It reports them either at temperature 1, or behind everything that the sampler does to the logits.

    Raises:
        ValueError: with this sampling neither is what is needed.
    """
    if sampling.temperature in (0.0, 1.0):
        return "raw_logprobs"
    if sampling.top_k or sampling.top_p < 1.0:
        raise ValueError(f"vLLM cannot report log-probs at temperature {sampling.temperature} before top_k and top_p: "
                         'use temperature 1, or neither top_k nor top_p, or engine.kind = "torch"')  # fmt: skip
    return "processed_logprobs"
