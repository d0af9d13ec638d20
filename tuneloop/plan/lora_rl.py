"""Peak memory of the lora_rl step: trainer and rollout engine side by side, in one process or in several.

With the torch engine the two share the base weights, and only adapted matrices are held a second time. vLLM has weights
of its own; asleep (level 1) they lie in host memory, so its phases and the trainer's do not add up on the GPU.
ZeRO (arXiv:1910.02054) parts the masters and moments over the processes, from stage 2 on the gradients, at stage 3 the
parameters; see `tuneloop.training.zero`.
"""

from dataclasses import dataclass

from tuneloop.plan.activations import FP32, training_pass
from tuneloop.plan.devices import Device
from tuneloop.plan.inputs import DTYPE_BYTES, PlanInputs, adapter_size, rl_work
from tuneloop.plan.memory import (
    ADAM_BYTES,
    GPU_CONTEXT_BYTES,
    GPU_RUNTIME_HOST_BYTES,
    STATE_BYTES,
    VLLM,
    VLLM_HOST_BYTES,
    Items,
    StepMemory,
    Usage,
    head_parameters,
    keeps_reference,
    on_cpu,
    on_gpu,
    rollouts,
    runtime,
    score_usage,
    tokenizer_bytes,
    trained_parameters,
)
from tuneloop.plan.rollout import VLLM_ASLEEP_BYTES, vllm_on_cpu, vllm_rollout

LIVE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters: put together at once


@dataclass(frozen=True)
class Spread:
    """How the trainer is spread.

    Attributes:
        processes: of the trainer.
        stage: of ZeRO; 0 without DeepSpeed.
    """

    processes: int
    stage: int
    offload_optimizer: bool
    offload_parameters: bool

    @property
    def parameter_parts(self) -> int:
        """Into how many parts the weights are cut."""
        return self.processes if self.stage == 3 else 1


def spread(inputs: PlanInputs, gpus: int) -> Spread:
    """How many processes train, and what DeepSpeed does for them."""
    settings = inputs.rl.distributed
    processes = gpus if settings.processes == "auto" else settings.processes
    together = processes > 1 or settings.offloads
    return Spread(
        processes, settings.zero_stage if together else 0, settings.offload_optimizer, settings.offload_parameters
    )


def plan_lora_rl(inputs: PlanInputs, device: Device, gpus: int = 1) -> StepMemory:
    """The RL step on `gpus` GPUs of one machine, or on its CPU."""
    parts = spread(inputs, 1 if device.is_cpu else gpus)
    usages = _usages(inputs, device, parts)
    trainer = _trainer(inputs, parts)
    if device.is_cpu:
        held = {**runtime(inputs), **_loaded(inputs, parts), **trainer, **_engine(inputs, parts, on_host=True)}
        held |= {name: size for name, size in _kept_on_host(inputs, parts).items() if size}
        if inputs.rl.engine.kind == "vllm":
            held |= vllm_on_cpu(inputs, inputs.rl.engine, inputs.rl.engine.max_sequences)
        return on_cpu("lora_rl", inputs.width, held, usages, parts.processes)
    static = {"context": GPU_CONTEXT_BYTES, **_loaded(inputs, parts), **trainer, **_engine(inputs, parts)}
    return on_gpu("lora_rl", static, usages, _hosts(inputs, parts, gpus), min(gpus, parts.processes))


def _loaded(inputs: PlanInputs, parts: Spread) -> Items:
    """The base weights, as the trainer holds them on one device."""
    if parts.stage == 3 and parts.offload_parameters:
        return {}
    return {"weights": inputs.weight_bytes // parts.parameter_parts}


def _trainer(inputs: PlanInputs, parts: Spread) -> Items:
    """What the trainer holds throughout, beside the base weights, on one device."""
    full = inputs.rl.mode == "full"
    trained, heads = trained_parameters(inputs, full), head_parameters(inputs)
    adapter = 0 if full else inputs.width * trained
    shared = parts.processes if parts.stage else 1
    moments = 0 if parts.offload_optimizer else (FP32 + ADAM_BYTES) * trained // shared
    gradients = FP32 * trained // (shared if parts.stage >= 2 else 1)
    return {
        "adapter": adapter if parts.stage < 3 else adapter // parts.processes,
        "reference": inputs.width * trained if keeps_reference(inputs) else 0,
        "masters and moments": moments,
        "gradients": 0 if parts.offload_optimizer and parts.stage >= 2 else gradients,
        "heads": heads * (FP32 + FP32 + FP32 + FP32 + ADAM_BYTES),
    }


def _engine(inputs: PlanInputs, parts: Spread, on_host: bool = False) -> Items:
    """What the torch engine holds throughout on one device: the adapter, the merged matrices."""
    if inputs.rl.engine.kind == "vllm" or inputs.rl.mode == "full":
        return {}
    size = adapter_size(inputs)
    held = {
        "engine's adapter": 2 * inputs.width * size.parameters,  # the old one goes when the new one has come
        "engine's merged matrices": inputs.width * size.matrices,
    }
    if parts.stage == 3:
        held["engine's weights"] = inputs.weight_bytes  # the trainer's are in parts
    return held


def _usages(inputs: PlanInputs, device: Device, parts: Spread) -> list[Usage]:
    """The phases of an update, and saving."""
    rl, cpu, full = inputs.rl, device.is_cpu, inputs.rl.mode == "full"
    work = rl_work(inputs, parts.processes)
    found = training_pass(inputs, work, full=full, checkpointing=rl.gradient_checkpointing, on_cpu=cpu)
    sampling, scoring = Usage("rollout"), score_usage(inputs, work, cpu)
    update, saving = Usage("update").add_pass(found), Usage("save")
    trained = trained_parameters(inputs, full)
    if cpu or not parts.stage:
        saving.add("checkpoint in the making", STATE_BYTES * trained if cpu else 0, FP32 * trained)
    if parts.stage:
        bucket = 2 * FP32 * min(trained, rl.distributed.bucket_elements)
        update.add("exchange buffers", bucket)
    usages = [sampling, scoring, update, saving]
    if parts.stage == 3:
        for usage in usages[1:]:
            usage.add("weights put together", _gathered(inputs))
    if rl.engine.kind == "torch":
        sampling.add_rollout(rollouts(inputs, parts.processes))
    elif not cpu:
        share = vllm_rollout(inputs, rl.engine, device).share
        asleep = VLLM_ASLEEP_BYTES if rl.engine.sleep else share
        for usage in usages:
            usage.add(VLLM, share if usage is sampling else asleep)
    return usages


def _gathered(inputs: PlanInputs) -> int:
    """Parameters that stage 3 holds whole at once: the next layers, what is fetched ahead, and the output head."""
    shape, settings = inputs.shape, inputs.rl.distributed
    layers = min(shape.layers * shape.layer_parameters, LIVE_ELEMENTS + settings.bucket_elements)
    return inputs.width * (max(layers, shape.layer_parameters) + shape.vocabulary * shape.hidden)


def _kept_on_host(inputs: PlanInputs, parts: Spread) -> Items:
    """Copies in the memory of one process that are the same on a CPU and beside a GPU."""
    full = inputs.rl.mode == "full"
    trained = trained_parameters(inputs, full)
    copies = parts.processes == 1 and not full
    return {
        "adapter of the warm-up": 0 if full else inputs.width * trained,
        "state before the update": STATE_BYTES * trained if copies else 0,
    }


def _hosts(inputs: PlanInputs, parts: Spread, gpus: int) -> dict[str, Items]:
    """What each phase on GPUs holds in the machine's memory."""
    trained, rl = trained_parameters(inputs, inputs.rl.mode == "full"), inputs.rl
    processes = parts.processes
    held = {
        "python and torch": processes * GPU_RUNTIME_HOST_BYTES,
        "tokenizer": processes * tokenizer_bytes(inputs),
        **{name: processes * size for name, size in _kept_on_host(inputs, parts).items()},
    }
    if parts.offload_parameters:
        held["weights, offloaded"] = inputs.weight_bytes
    if parts.offload_optimizer:
        held["optimiser, offloaded"] = (2 * FP32 + ADAM_BYTES) * trained
    asleep = 0
    if rl.engine.kind == "vllm":
        engines = max(1, processes // rl.engine.tensor_parallel_size)
        held["vLLM's processes"] = engines * rl.engine.tensor_parallel_size * VLLM_HOST_BYTES
        asleep = engines * inputs.weight_bytes if rl.engine.sleep else 0
        if rl.engine.use_shm:
            held["base model in /dev/shm"] = inputs.shape.parameters * DTYPE_BYTES[inputs.shape.dtype]
    loading = {**held, "weights while loading": inputs.weight_bytes}
    if parts.stage == 3 and parts.offload_parameters:
        loading.pop("weights, offloaded")  # read on the way there
    working = {**held, "vLLM's weights, asleep": asleep} if asleep else held
    return {"rollout": max(loading, working, key=lambda items: sum(items.values())), "score": working,
            "update": working, "save": {**working, "checkpoint in the making": STATE_BYTES * trained}}  # fmt: skip
