"""What the run will need: parameters, memory and disk. Only what follows from sizes; activations are not guessed."""

from typing import Any

from components.check.model import BaseModel
from components.config import RunConfig

_DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_ADAM_BYTES = 12  # a parameter: fp32 master and two fp32 moments


def make_plan(config: RunConfig, model: BaseModel) -> dict[str, Any]:
    """The content of plan.json, in bytes.

    `memory_bytes` is a lower bound for training: weights, adapter, gradients and optimiser. Activations, the rollout
    engine's key-value cache and the framework come on top.
    """
    held = _DTYPE_BYTES[config.model.dtype]
    adapter = model.adapter_parameters
    trained = model.parameters if config.sft_warmup.mode == "full" and config.sft_warmup.updates else adapter
    memory = {
        "weights": model.parameters * held,
        "adapter": adapter * held,
        "gradients": trained * held,
        "optimizer": trained * _ADAM_BYTES,
    }
    merged = config.merge_adapter.dtype
    stored = sum(tensor.bytes for tensor in model.tensors.values())
    checkpoint = adapter * (held + _ADAM_BYTES)
    disk = {
        "merged_model": stored if merged == "base" else model.parameters * _DTYPE_BYTES[merged],
        "warmed_up_model": model.parameters * held if config.sft_warmup.mode == "full" else 0,
        "adapters": 3 * adapter * 4,  # the warm-up's, the training's, the registry's
        "checkpoints": (config.lora_rl.keep_checkpoints + 1) * checkpoint,  # one more while one is replaced
    }
    return {
        "model_uri": config.model.uri,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "target_modules": len(model.targets),
        "adapter_parameters": adapter,
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "disk_bytes": {**disk, "total": sum(disk.values())},
        "sampled_completions": config.lora_rl.updates * config.lora_rl.prompts_per_update * config.lora_rl.group_size,
    }
