"""Peak memory of the steps that hold a model: sft_warmup, lora_rl, evaluate.

A step goes through phases; what it holds throughout is in each of them, so a phase's items add up to what is held then
and the peak is the largest phase. On a CPU everything is host memory, and the C library's allocator keeps what was
freed in pieces smaller than `MAPPED_FROM`: a peak of one phase stays for all later ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tuneloop.algorithms.traits import TRAITS
from tuneloop.plan.activations import FP32, Activations, scoring_pass, training_pass
from tuneloop.plan.devices import Device
from tuneloop.plan.inputs import PackedWork, PlanInputs, adapter_size, sft_work
from tuneloop.plan.rollout import TorchRollout, torch_rollout, vllm_on_cpu, vllm_rollout

Items = dict[str, int]

CPU_RUNTIME_BYTES = 545_000_000  # resident once torch 2.13, transformers and the step's own modules are imported (CPU)
TOKENIZER_FACTOR = 18  # resident bytes a byte of tokenizer.json
TOKENIZER_ENTRY_BYTES = 1_100  # resident bytes an entry of the vocabulary, when the file is not known
MAPPED_FROM = 32 << 20  # glibc's largest mmap threshold: larger pieces go back to the system when they are freed
HEAP_FACTOR = {2: 1.6, 4: 1.35}  # by a weight's bytes: resident bytes a byte that is held in smaller pieces (measured:
# holes that fit nothing; bfloat16's kernels leave more of them, because they copy what they multiply)
GPU_CONTEXT_BYTES = 1_000_000_000  # CUDA context, cuBLAS, NCCL
GPU_FACTOR = 1.1  # of what comes and goes: torch's caching allocator
GPU_RUNTIME_HOST_BYTES = 4_000_000_000  # host memory of a process that uses CUDA
VLLM_HOST_BYTES = 5_000_000_000  # host memory of one vLLM process on a GPU
VLLM = "vLLM"  # the item that another process holds, with an allocator of its own
PROBED_PROMPTS, PROBED_COMPLETIONS = 8, 2  # on which KL is measured when the objective does not hold the reference
ADAM_BYTES = 8  # two fp32 moments
STATE_BYTES = 12  # master and moments, as a checkpoint holds them


@dataclass(frozen=True)
class Phase:
    """What is held at one time: bytes by name, on one GPU and in the machine's memory."""

    name: str
    device: Items
    host: Items

    @property
    def device_bytes(self) -> int:
        """On one GPU."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """In the machine's memory, over all processes."""
        return sum(self.host.values())


@dataclass(frozen=True)
class StepMemory:
    """The phases of one step, and on how many GPUs it runs."""

    step: str
    phases: tuple[Phase, ...]
    gpus: int = 1

    @property
    def device_peak(self) -> Phase:
        """The phase that holds most on one GPU."""
        return max(self.phases, key=lambda phase: phase.device_bytes)

    @property
    def host_peak(self) -> Phase:
        """The phase that holds most in the machine's memory."""
        return max(self.phases, key=lambda phase: phase.host_bytes)


@dataclass
class Usage:
    """What one phase adds to what is held throughout: bytes by name, with the size of the largest piece of each."""

    name: str
    items: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, name: str, size: int, piece: int | None = None) -> "Usage":
        """Note `size` bytes in pieces of at most `piece` bytes (None: one piece)."""
        if size > 0:
            self.items[name] = (size, size if piece is None else piece)
        return self

    def add_pass(self, found: Activations) -> "Usage":
        """Note a forward and backward pass."""
        self.add("activations", found.saved, found.largest)
        self.add("output head", found.head, found.head // 2)
        return self.add("working space", found.scratch, found.scratch // 5)

    def add_rollout(self, found: TorchRollout) -> "Usage":
        """Note a generate call of the torch engine."""
        self.add("key-value cache", found.cache, found.cache_tensor)
        if found.prefill > found.decode + found.logits:
            return self.add("prefill", found.prefill, found.prefill_tensor)
        return self.add("logits", found.logits).add("attention scores", found.decode, found.decode // 4)


def on_cpu(step: str, width: int, static: Mapping[str, int], usages: list[Usage], processes: int = 1) -> StepMemory:
    """The phases of a step whose every byte is resident in the host's memory.

    Args:
        width: bytes of one weight.
        static: held throughout, by one process.
        processes: that do the same side by side.
    """

    def heap(usage: Usage) -> int:
        return sum(size for size, piece in usage.items.values() if piece < MAPPED_FROM)

    most = max(heap(usage) for usage in usages)
    phases = []
    for usage in usages:
        held = {**static, **{name: size for name, (size, _) in usage.items.items()}}
        held["kept by the allocator"] = int(HEAP_FACTOR[width] * most) - heap(usage)
        phases.append(Phase(usage.name, {}, {name: size * processes for name, size in held.items()}))
    return StepMemory(step, tuple(phases))


def on_gpu(
    step: str, static: Mapping[str, int], usages: list[Usage], hosts: Mapping[str, Items], gpus: int = 1
) -> StepMemory:
    """The phases of a step on GPUs.

    Args:
        static: held throughout on one GPU.
        hosts: what each phase holds in the host's memory, over all processes.
    """
    phases = []
    for usage in usages:
        held = {name: size for name, (size, _) in usage.items.items()}
        slack = {"kept by the allocator": int((GPU_FACTOR - 1) * (sum(held.values()) - held.get(VLLM, 0)))}
        phases.append(Phase(usage.name, {**static, **held, **slack}, dict(hosts.get(usage.name, {}))))
    return StepMemory(step, tuple(phases), gpus)


def tokenizer_bytes(inputs: PlanInputs) -> int:
    """Resident bytes of the tokenizer."""
    known = TOKENIZER_FACTOR * inputs.tokenizer_bytes
    return known or TOKENIZER_ENTRY_BYTES * inputs.shape.vocabulary


def runtime(inputs: PlanInputs) -> Items:
    """What a process holds before it has a model, on a CPU."""
    return {"python and torch": CPU_RUNTIME_BYTES, "tokenizer": tokenizer_bytes(inputs)}


def trained_parameters(inputs: PlanInputs, full: bool) -> int:
    """Elements that the optimiser moves; heads of the algorithm are counted by `head_parameters`."""
    return inputs.shape.parameters if full else adapter_size(inputs).parameters


def head_parameters(inputs: PlanInputs) -> int:
    """Elements of the small networks that some algorithms train beside the adapter."""
    layers = {"ppo": 1, "flowrl": 2}.get(inputs.rl.algorithm.name, 0)
    return layers * (inputs.shape.hidden**2 + 3 * inputs.shape.hidden) + (inputs.shape.hidden + 1 if layers else 0)


def keeps_reference(inputs: PlanInputs) -> bool:
    """Whether a second copy of what is trained is kept: always of an adapter, of all weights if the objective asks."""
    algorithm = inputs.rl.algorithm
    return inputs.rl.mode == "lora" or algorithm.kl_coefficient > 0 or TRAITS[algorithm.name].holds_reference


def sft_usages(inputs: PlanInputs, cpu: bool) -> list[Usage]:
    """Phases of the warm-up."""
    sft, full = inputs.sft, inputs.sft.mode == "full"
    trained, work = trained_parameters(inputs, full), sft_work(inputs)
    found = training_pass(
        inputs,
        work,
        full=full,
        checkpointing=sft.gradient_checkpointing,
        dropout=0.0 if full else inputs.lora.dropout,
        on_cpu=cpu,
    )
    if not reads_weights(inputs):
        return [Usage("save")]
    saving = Usage("save")
    if sft.updates > sft.checkpoint_every:
        saving.add("checkpoint in the making", STATE_BYTES * trained, FP32 * trained)
    validating = Usage("validate").add("activations", scoring_pass(inputs, work.tokens, cpu), found.largest)
    return [validating, Usage("update").add_pass(found), saving]


def reads_weights(inputs: PlanInputs) -> bool:
    """Whether the warm-up computes anything; else it leaves a fresh adapter, and needs the weights' shapes alone."""
    return inputs.sft.updates > 0 or inputs.sft.mode == "full" or inputs.lora.init == "svd"


def score_usage(inputs: PlanInputs, work: PackedWork, cpu: bool) -> Usage:
    """Log-probs before the update: the probe of KL, which takes a few prompts' groups at once, or the micro-batches."""
    tokens = work.tokens
    algorithm = inputs.rl.algorithm
    if keeps_reference(inputs) and algorithm.kl_coefficient == 0 and not TRAITS[algorithm.name].holds_reference:
        probed = inputs.prompt_tokens + PROBED_COMPLETIONS * (inputs.completion_tokens - 1)
        tokens = max(tokens, min(PROBED_PROMPTS, inputs.rl.prompts_per_update) * probed)
    piece = tokens * inputs.shape.intermediate * inputs.width
    return Usage("score").add("activations", scoring_pass(inputs, tokens, cpu), piece)


def rollouts(inputs: PlanInputs, processes: int) -> TorchRollout:
    """The larger of a round of sampling and a validation, by the torch engine."""
    rl = inputs.rl
    mine, held_out = -(-rl.prompts_per_update // processes), -(-rl.validation_prompts // processes)
    sampled = torch_rollout(inputs, mine, rl.group_size, rl.engine.max_sequences)
    greedy = torch_rollout(inputs, held_out, 1, rl.engine.max_sequences)
    return max(sampled, greedy, key=lambda rollout: rollout.total)


def plan_sft(inputs: PlanInputs, device: Device) -> StepMemory:
    """The warm-up, which runs in one process on one device."""
    full = inputs.sft.mode == "full"
    trained = trained_parameters(inputs, full)
    adapter = 0 if full else trained
    static = {
        "weights": inputs.weight_bytes if reads_weights(inputs) else 0,
        "adapter": inputs.width * adapter,
        "masters and gradients": 2 * FP32 * trained if reads_weights(inputs) else 0,
        "moments": ADAM_BYTES * trained if inputs.sft.updates else 0,
    }
    copied = 0 if full or not inputs.sft.updates else STATE_BYTES * trained
    usages = sft_usages(inputs, device.is_cpu)
    if device.is_cpu:
        held = {**runtime(inputs), **static, "state before the update": copied}
        return on_cpu("sft_warmup", inputs.width, held, usages)
    host = {
        "python and torch": GPU_RUNTIME_HOST_BYTES,
        "tokenizer": tokenizer_bytes(inputs),
        "weights while loading": static["weights"],
        "state before the update": copied,
    }
    hosts = {usage.name: host for usage in usages}
    return on_gpu("sft_warmup", {"context": GPU_CONTEXT_BYTES, **static}, usages, hosts)


def plan_evaluate(inputs: PlanInputs, device: Device) -> StepMemory:
    """The evaluation, which holds one base and one merged adapter at a time, on one device."""
    engine = inputs.evaluation_engine
    if engine.kind == "vllm" and not device.is_cpu:
        usage = Usage("answer").add(VLLM, vllm_rollout(inputs, engine, device).share)
        shared = inputs.weight_bytes if engine.use_shm else 0
        processes = GPU_RUNTIME_HOST_BYTES + engine.tensor_parallel_size * VLLM_HOST_BYTES
        host = {"python, torch and vLLM": processes, "base model in /dev/shm": shared}
        return on_gpu("evaluate", {}, [usage], {"answer": host}, engine.tensor_parallel_size)
    if engine.kind == "vllm":
        return on_cpu(
            "evaluate",
            inputs.width,
            {**runtime(inputs), **vllm_on_cpu(inputs, engine, inputs.evaluated)},
            [Usage("answer")],
        )
    prompts = max(1, inputs.evaluated // inputs.evaluation_samples)
    sampled = torch_rollout(inputs, prompts, inputs.evaluation_samples, inputs.evaluated)
    greedy = torch_rollout(inputs, inputs.evaluated, 1, inputs.evaluated)
    size = adapter_size(inputs)
    static = {
        "weights": inputs.weight_bytes,
        "adapters": 2 * inputs.width * size.parameters,
        "merged matrices": inputs.width * size.matrices,
    }
    usage = Usage("answer").add_rollout(max(sampled, greedy, key=lambda rollout: rollout.total))
    if device.is_cpu:
        return on_cpu("evaluate", inputs.width, {**runtime(inputs), **static}, [usage])
    host = {
        "python and torch": GPU_RUNTIME_HOST_BYTES,
        "tokenizer": tokenizer_bytes(inputs),
        "weights while loading": inputs.weight_bytes,
    }
    return on_gpu("evaluate", {"context": GPU_CONTEXT_BYTES, **static}, [usage], {"answer": host})
