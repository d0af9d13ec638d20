"""Bytes of the rollout engines.

Formulas follow `tuneloop.rollout.torch_engine` and `kv_cache`. For vLLM on a GPU, its share is taken whole; what is
computed is whether weights and a key-value cache go into it.
"""

import math
from dataclasses import dataclass

from tuneloop.plan.activations import FP32, logits_scratch
from tuneloop.plan.devices import Device
from tuneloop.plan.inputs import DTYPE_BYTES, PlanInputs
from tuneloop.rollout.settings import EngineSettings, cpu_cache_bytes, engine_rank

PREFILL_TOKENS = 32_768  # prompt tokens of one forward pass; see `torch_engine`
ROOM_STEP = 16  # tokens by which a completion's cache grows at least
VLLM_WORKING_BYTES = 3_000_000_000  # of one GPU: context, CUDA graphs, activations of a prefill of 8,192 tokens
VLLM_CPU_BYTES = 760_000_000  # resident once vLLM's CPU build 0.32 is imported and warm
VLLM_ASLEEP_BYTES = 1_500_000_000  # of one GPU: context, CUDA graphs, exchange buffers


@dataclass(frozen=True)
class TorchRollout:
    """Bytes of one `generate` call of the torch engine, and of the largest tensors among them.

    Attributes:
        prompts: decoded at once.
    """

    prompts: int
    cache: int
    cache_tensor: int
    prefill: int
    prefill_tensor: int
    decode: int
    logits: int

    @property
    def total(self) -> int:
        """All that is held at the same time; prefill and decode take turns."""
        return self.cache + max(self.prefill, self.decode + self.logits)


def torch_rollout(inputs: PlanInputs, prompts: int, samples: int, max_sequences: int) -> TorchRollout:
    """What it takes to sample `samples` completions of full length for each of `prompts` prompts of full length."""
    shape, width = inputs.shape, inputs.width
    at_once = min(prompts, max(1, max_sequences // samples), max(1, PREFILL_TOKENS // inputs.prompt_tokens))
    room = 0
    while room < inputs.completion_tokens - 1:  # see `kv_cache.GroupCache.reserve`
        room = ROOM_STEP * math.ceil(max(room + 1, room + room // 4) / ROOM_STEP)
    prompt_cache = at_once * inputs.prompt_tokens * shape.kv_width * width
    own_cache = at_once * samples * room * shape.kv_width * width
    tokens = at_once * inputs.prompt_tokens
    a_layer = 4 * shape.hidden + 2 * shape.query_width + 2 * shape.kv_width + 3 * shape.intermediate
    seen = inputs.prompt_tokens + inputs.completion_tokens
    return TorchRollout(
        prompts=at_once,
        cache=2 * shape.layers * (prompt_cache + own_cache),
        cache_tensor=max(prompt_cache, own_cache),
        prefill=tokens * a_layer * width,
        prefill_tensor=tokens * shape.intermediate * width,
        decode=at_once * samples * shape.heads * seen * (2 * FP32 + 2 * width),
        logits=at_once * samples * shape.vocabulary * width + logits_scratch(inputs, at_once * samples),
    )


def vllm_on_cpu(inputs: PlanInputs, engine: EngineSettings, max_sequences: int) -> dict[str, int]:
    """What vLLM's process holds in the host's memory when there is no GPU."""
    shape, width = inputs.shape, inputs.width
    a_token = 2 * shape.layers * shape.kv_width * width
    adapters = 0
    if engine.sync == "adapter":
        adapters = width * engine_rank(inputs.max_rank) * sum(out + into for out, into, _ in inputs.targets.values())
    return {
        "vLLM's process": VLLM_CPU_BYTES,
        "vLLM's weights": 2 * inputs.weight_bytes + adapters,  # and as oneDNN's kernels read them
        "vLLM's key-value cache": engine.kv_cache_bytes or cpu_cache_bytes(a_token, inputs.max_length, max_sequences),
        "base model in /dev/shm": shape.parameters * DTYPE_BYTES[shape.dtype] if engine.use_shm else 0,
    }


@dataclass(frozen=True)
class VllmRollout:
    """How vLLM's share of one GPU is used.

    Attributes:
        share: `gpu_memory_utilization` of the GPU, or what goes with the cache that is asked for.
        weights, adapters: of them; vLLM holds every adapter at the largest rank that it was started for.
        cache: what is left for keys and values; negative when the weights alone do not go in.
        a_sequence: cache of the longest sequence.
    """

    share: int
    weights: int
    adapters: int
    cache: int
    a_sequence: int

    @property
    def sequences(self) -> int:
        """Sequences of full length that the cache holds at once."""
        return max(0, self.cache // max(1, self.a_sequence))


def vllm_rollout(inputs: PlanInputs, engine: EngineSettings, device: Device) -> VllmRollout:
    """vLLM on one of the GPUs of its tensor-parallel group."""
    shape, width = inputs.shape, inputs.width
    size = engine.tensor_parallel_size
    weights = math.ceil(inputs.weight_bytes / size)
    adapters = 0
    if engine.sync != "merged":
        rank = engine_rank(inputs.max_rank)
        adapters = width * rank * sum(out + into for out, into, _ in inputs.targets.values())
    a_token = 2 * shape.layers * math.ceil(shape.kv_heads / size) * shape.head_size * width
    besides = weights + adapters + VLLM_WORKING_BYTES
    share = int(engine.gpu_memory_utilization * device.memory_bytes)
    if engine.kv_cache_bytes:  # vLLM does not look at the utilization then
        share = besides + engine.kv_cache_bytes
    return VllmRollout(share, weights, adapters, share - besides, a_token * inputs.max_length)
