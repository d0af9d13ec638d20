"""Time of an update and of a run, from arithmetic and from memory traffic, at utilisations that are stated here.

A forward pass of one token takes 2 operations a weight, a backward pass 2 more for the gradient of its input and, of
weights that are trained, 2 for theirs (Kaplan et al., 2020, arXiv:2001.08361): LoRA's update costs 4 a base weight
and 6 an adapter weight. Decoding reads the weights and the key-value cache once a token, so it is bound by bandwidth
until many sequences are decoded at once.
"""

import math
from dataclasses import dataclass

from tuneloop.algorithms.traits import TRAITS
from tuneloop.plan.devices import Device
from tuneloop.plan.inputs import PlanInputs, adapter_size, rl_work, sft_work
from tuneloop.plan.lora_rl import spread
from tuneloop.plan.memory import PROBED_COMPLETIONS, PROBED_PROMPTS
from tuneloop.plan.rollout import vllm_rollout
from tuneloop.rollout.settings import EngineSettings

TRAIN_UTILISATION = 0.4  # share of the peak arithmetic that forward and backward passes reach
PREFILL_UTILISATION = 0.5
DECODE_UTILISATION = 0.6  # share of the memory bandwidth that decoding reaches
STEP_SECONDS = {
    "torch": 0.02,
    "vllm": 0.004,
}  # of one decoded token beside its arithmetic, on a GPU: launches, sampling
LORA_DECODE_FACTOR = 1.35  # unmerged adapters in vLLM: 1.3-1.4 times a token's time
LINK_UTILISATION = 0.7
EVALUATED_MODELS = 4  # base, warm-up, candidate, incumbent


@dataclass(frozen=True)
class RunTime:
    """Seconds; completions are taken to have their full length, so this is from above.

    Attributes:
        update: by phase: sample, score, update, sync.
        warm_up, run: of the whole warm-up, and of all steps that hold a model.
    """

    update: dict[str, float]
    warm_up: float
    evaluation: float
    updates: int

    @property
    def update_seconds(self) -> float:
        """Of one update."""
        return sum(self.update.values())

    @property
    def run(self) -> float:
        """Of warm-up, RL and evaluation."""
        return self.warm_up + self.updates * self.update_seconds + self.evaluation


def plan_time(inputs: PlanInputs, device: Device, gpus: int = 1) -> RunTime:
    """The time of a run on this hardware."""
    rl, gpus = inputs.rl, 1 if device.is_cpu else gpus
    parts = spread(inputs, gpus)
    update = {
        "sample": _sampling_seconds(
            inputs, rl.engine, device, parts.processes, rl.prompts_per_update, rl.group_size, rl.engine.max_sequences
        ),
        "score": _score_seconds(inputs, device, parts.processes),
        "update": _update_seconds(inputs, device, gpus),
        "sync": _sync_seconds(inputs, device, gpus),
    }
    sft = inputs.sft
    a_step = _training_flops(inputs, sft.mode == "full") * sft_work(inputs).group_tokens * sft.examples_per_update
    warm_up = sft.updates * a_step / (TRAIN_UTILISATION * _flops(inputs, device))
    answers = [
        _sampling_seconds(
            inputs, inputs.evaluation_engine, device, 1, inputs.evaluated_prompts, samples, inputs.evaluated
        )
        for samples in (1, inputs.evaluation_samples)
    ]
    return RunTime(update, warm_up, EVALUATED_MODELS * sum(answers), rl.updates)


def _flops(inputs: PlanInputs, device: Device) -> float:
    """Operations a second in the model's dtype; fp32 runs at a quarter of bf16's rate on a CPU, at half on a GPU."""
    return device.flops / (1 if inputs.width == 2 else 4 if device.is_cpu else 2)


def _computing(inputs: PlanInputs) -> int:
    """Weights that every token is multiplied with: all but the embedding."""
    shape = inputs.shape
    return shape.layers * shape.layer_parameters + shape.vocabulary * shape.hidden


def _training_flops(inputs: PlanInputs, full: bool, checkpointing: bool = False) -> float:
    """Operations a packed token of a forward and a backward pass."""
    base = (6 if full else 4) * _computing(inputs) + (2 * _computing(inputs) if checkpointing else 0)
    return base + (0 if full else 6 * adapter_size(inputs).parameters)


def _update_seconds(inputs: PlanInputs, device: Device, gpus: int) -> float:
    rl, parts = inputs.rl, spread(inputs, gpus)
    work = rl_work(inputs, parts.processes)
    passes = work.passes * rl.algorithm.minibatches
    tokens = work.group_tokens * math.ceil(rl.prompts_per_update / parts.processes)
    a_token = _training_flops(inputs, rl.mode == "full", rl.gradient_checkpointing)
    a_token += 4 * inputs.shape.layers * inputs.shape.query_width * (work.prompt_tokens + work.completion_tokens)
    seconds = tokens * a_token / (TRAIN_UTILISATION * _flops(inputs, device))
    if parts.stage == 3:  # every pass puts the weights together in the forward and in the backward direction
        rate = device.host_link * parts.processes if parts.offload_parameters else device.link
        gathers = 3 if rl.gradient_checkpointing else 2
        seconds = max(seconds, gathers * passes * inputs.weight_bytes / (LINK_UTILISATION * min(rate, device.link)))
    return seconds


def _score_seconds(inputs: PlanInputs, device: Device, processes: int) -> float:
    """Forward passes before the update: old log-probs of later minibatches, the reference's, or KL's probe."""
    rl, algorithm = inputs.rl, inputs.rl.algorithm
    work = rl_work(inputs, processes)
    tokens = work.group_tokens * math.ceil(rl.prompts_per_update / processes)
    share = 1.0 - 1.0 / algorithm.minibatches
    if algorithm.kl_coefficient > 0 or TRAITS[algorithm.name].holds_reference:
        share += 1.0
    else:
        probed = PROBED_PROMPTS * (inputs.prompt_tokens + PROBED_COMPLETIONS * inputs.completion_tokens)
        share += min(tokens, probed) / tokens  # the reference alone: the policy's are known from the rollout
    return share * tokens * 2 * _computing(inputs) / (TRAIN_UTILISATION * _flops(inputs, device))


def _sampling_seconds(
    inputs: PlanInputs,
    engine: EngineSettings,
    device: Device,
    processes: int,
    prompts: int,
    samples: int,
    max_sequences: int,
) -> float:
    """All completions of one round, shared by the processes' engines; they never share a sequence."""
    size = engine.tensor_parallel_size if engine.kind == "vllm" else 1
    engines = max(1, processes // size)
    mine = math.ceil(prompts / engines)
    at_once = min(mine * samples, max_sequences)
    factor = 1.0
    if engine.kind == "vllm" and not device.is_cpu:
        held = vllm_rollout(inputs, engine, device).sequences
        at_once = min(at_once, held or 1)
        factor = 1.0 if engine.sync == "merged" else LORA_DECODE_FACTOR
    decoding = _decoding(inputs, device, size, mine * samples, max(1, at_once), engine.kind)
    return _prefill(inputs, device, size, mine) + factor * decoding


def _prefill(inputs: PlanInputs, device: Device, size: int, prompts: int) -> float:
    operations = 2 * _computing(inputs) * prompts * inputs.prompt_tokens
    return operations / (PREFILL_UTILISATION * size * _flops(inputs, device))


def _decoding(inputs: PlanInputs, device: Device, size: int, sequences: int, at_once: int, kind: str) -> float:
    """Rounds of `at_once` sequences: each token reads weights and caches, or is bound by its arithmetic."""
    shape, width = inputs.shape, inputs.width
    cached = 2 * shape.layers * shape.kv_width * width * (inputs.prompt_tokens + inputs.completion_tokens / 2)
    read = (_computing(inputs) * width + at_once * cached) / (size * DECODE_UTILISATION * device.bandwidth)
    computed = 2 * _computing(inputs) * at_once / (size * PREFILL_UTILISATION * _flops(inputs, device))
    exchanged = 0.0
    if size > 1:  # two sums over the group a layer
        exchanged = 4 * shape.layers * at_once * shape.hidden * width / (LINK_UTILISATION * device.link)
    a_token = max(read, computed) + exchanged + (0.0 if device.is_cpu else STEP_SECONDS[kind])
    return math.ceil(sequences / at_once) * inputs.completion_tokens * a_token


def _sync_seconds(inputs: PlanInputs, device: Device, gpus: int) -> float:
    """The adapter's way to the engine: merged into its matrices, or through memory; and vLLM's waking."""
    rl, size = inputs.rl, adapter_size(inputs)
    if rl.mode == "full":
        return 0.0
    if rl.engine.kind == "torch":
        return 8 * size.matrices * inputs.width / device.bandwidth  # read, widened, added to, rounded, written
    waking = 2 * inputs.weight_bytes / rl.engine.tensor_parallel_size / device.host_link if rl.engine.sleep else 0.0
    sent = 4 * inputs.width * size.parameters
    if rl.engine.sync == "merged":  # each process reads the whole base again and folds the adapter in
        sent += inputs.weight_bytes
    return waking + sent / device.host_link
