"""The plan of a run on one kind of hardware: what its steps hold, what limits them, and how long they take.

The steps are those that hold a model on the device; the others need neither it nor much memory.
"""

from dataclasses import dataclass
from typing import Any

from tuneloop.errors import UserError
from tuneloop.plan.devices import Device
from tuneloop.plan.inputs import PlanInputs
from tuneloop.plan.lora_rl import plan_lora_rl, spread
from tuneloop.plan.memory import Phase, StepMemory, plan_evaluate, plan_sft
from tuneloop.plan.rollout import vllm_rollout
from tuneloop.plan.timing import RunTime, plan_time
from tuneloop.rollout.settings import EngineSettings, engine_rank

STEPS = ("sft_warmup", "lora_rl", "evaluate")  # that hold a model on the device
TIGHT_SHARE = 0.9  # of the memory: past it, the plan's own error may decide


@dataclass(frozen=True)
class Limit:
    """Why a step does not fit.

    Attributes:
        where: "GPU", "host" or "engine".
        needed, room: bytes.
        reason: one line: the phase, and what holds most in it.
    """

    step: str
    where: str
    needed: int
    room: int
    reason: str


@dataclass(frozen=True)
class Plan:
    """One run on `gpus` devices of one kind in one machine.

    Attributes:
        host_bytes: of the machine; 0: unknown, so it limits nothing.
    """

    device: Device
    gpus: int
    host_bytes: int
    steps: tuple[StepMemory, ...]
    limits: tuple[Limit, ...]
    time: RunTime

    @property
    def fits(self) -> bool:
        """Whether every step fits."""
        return not self.limits

    @property
    def needed(self) -> int:
        """The largest peak of what is planned for: of one GPU, or of the host's memory on a CPU."""
        return max(self.peak(step) for step in self.steps)

    @property
    def is_tight(self) -> bool:
        """Whether more than `TIGHT_SHARE` of the GPU's or of the host's memory is needed."""
        host = max(step.host_peak.host_bytes for step in self.steps)
        is_host_tight = self.host_bytes > 0 and host > TIGHT_SHARE * self.host_bytes
        return is_host_tight or self.needed > TIGHT_SHARE * self.device.memory_bytes

    def peak(self, step: StepMemory) -> int:
        """Bytes of one GPU, or of the host's memory on a CPU."""
        return step.host_peak.host_bytes if self.device.is_cpu else step.device_peak.device_bytes

    def record(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        return {
            "device": self.device.kind,
            "gpus": self.gpus,
            "memory_bytes": self.device.memory_bytes,
            "fits": self.fits,
            "tight": self.is_tight,
            "limits": [vars(limit) for limit in self.limits],
            "steps": {step.step: _step_record(step, self.device.is_cpu) for step in self.steps},
            "seconds": {
                "update": {**self.time.update, "total": self.time.update_seconds},
                "warm_up": self.time.warm_up,
                "evaluation": self.time.evaluation,
                "run": self.time.run,
            },
        }


def _step_record(step: StepMemory, cpu: bool) -> dict[str, Any]:
    record: dict[str, Any] = {"host_bytes": step.host_peak.host_bytes}
    if not cpu:
        record["gpu_bytes"] = step.device_peak.device_bytes
        record["gpus"] = step.gpus
    record["phases"] = {
        phase.name: {name: size for name, size in (phase.host if cpu else phase.device).items() if size}
        for phase in step.phases
    }
    return record


def make_plan(inputs: PlanInputs, device: Device, gpus: int = 1, host_bytes: int = 0) -> Plan:
    """Plan a run.

    Args:
        gpus: of this kind in the machine; 1 on a CPU.
        host_bytes: of the machine's memory; 0: not known.

    Raises:
        UserError: the settings cannot be met by this many GPUs, whatever their memory.
    """
    host_bytes = device.memory_bytes if device.is_cpu else host_bytes
    steps = tuple(plan_step(name, inputs, device, gpus) for name in STEPS)
    limits = [limit for step in steps for limit in step_limits(step, inputs, device, host_bytes)]
    return Plan(device, gpus, host_bytes, steps, tuple(limits), plan_time(inputs, device, gpus))


def plan_step(name: str, inputs: PlanInputs, device: Device, gpus: int) -> StepMemory:
    """The memory of one of `STEPS`.

    Raises:
        UserError: the settings cannot be met by this many GPUs, whatever their memory.
    """
    if name == "sft_warmup":
        return plan_sft(inputs, device)
    if name == "evaluate":
        _refuse_engine("evaluate", inputs, inputs.evaluation_engine, device, gpus)
        return plan_evaluate(inputs, device)
    if not device.is_cpu:
        _refuse_counts(inputs, gpus)
    _refuse_engine("lora_rl", inputs, inputs.rl.engine, device, gpus)
    return plan_lora_rl(inputs, device, gpus)


def step_limits(step: StepMemory, inputs: PlanInputs, device: Device, host_bytes: int) -> list[Limit]:
    """Why a step does not fit; empty when it does.

    Args:
        host_bytes: of the machine; 0: not known.
    """
    limits = _limits(step, device, host_bytes)
    engine = {"lora_rl": inputs.rl.engine, "evaluate": inputs.evaluation_engine}.get(step.step)
    if engine and engine.kind == "vllm" and not device.is_cpu:
        limits += _engine_limits(step.step, inputs, engine, device)
    return limits


def _refuse_counts(inputs: PlanInputs, gpus: int) -> None:
    processes, size = spread(inputs, gpus).processes, inputs.rl.engine.tensor_parallel_size
    if processes > gpus:
        raise UserError(f"lora_rl.distributed.processes = {processes}, but the plan is for {gpus} GPUs; plan for that "
                        'many, or set it to "auto"')  # fmt: skip
    if processes > 1 and processes % size:
        raise UserError(f"lora_rl.engine.tensor_parallel_size = {size} does not divide {processes} processes on {gpus} "
                        "GPUs: change one of the three")  # fmt: skip


def _refuse_engine(section: str, inputs: PlanInputs, engine: EngineSettings, device: Device, gpus: int) -> None:
    """What vLLM refuses to start with, whatever the memory."""
    if engine.kind != "vllm":
        return
    if engine.sync == "adapter" or (engine.sync == "auto" and not device.is_cpu):
        try:
            engine_rank(inputs.max_rank)
        except ValueError as error:
            raise UserError(f"{section}.engine: {error}") from None
    size, shape = engine.tensor_parallel_size, inputs.shape
    if device.is_cpu:
        return
    if size > gpus:
        raise UserError(f"{section}.engine.tensor_parallel_size = {size}, but the plan is for {gpus} GPUs: lower it, "
                        "or plan for more")  # fmt: skip
    if shape.heads % size or max(shape.kv_heads, size) % min(shape.kv_heads, size):
        raise UserError(f"{section}.engine.tensor_parallel_size = {size} does not part the model's {shape.heads} query "
                        f"and {shape.kv_heads} key/value heads evenly")  # fmt: skip


def _limits(step: StepMemory, device: Device, host_bytes: int) -> list[Limit]:
    found = []
    if not device.is_cpu and step.device_peak.device_bytes > device.memory_bytes:
        phase = step.device_peak
        found.append(_limit(step.step, "GPU", phase, phase.device, phase.device_bytes, device.memory_bytes))
    if host_bytes and step.host_peak.host_bytes > host_bytes:
        phase = step.host_peak
        found.append(_limit(step.step, "host", phase, phase.host, phase.host_bytes, host_bytes))
    return found


def _limit(step: str, where: str, phase: Phase, items: dict[str, int], needed: int, room: int) -> Limit:
    name, size = max(items.items(), key=lambda item: item[1])
    reason = f"{step} in its {phase.name} phase; {name} alone take {size / 1e9:,.1f} GB"
    return Limit(step, where, needed, room, reason)


def _engine_limits(step: str, inputs: PlanInputs, engine: EngineSettings, device: Device) -> list[Limit]:
    """vLLM does not start when its share leaves no cache for one sequence of full length."""
    rollout = vllm_rollout(inputs, engine, device)
    if rollout.cache >= rollout.a_sequence:
        return []
    needed = rollout.share - rollout.cache + rollout.a_sequence
    reason = (f"{step}: vLLM's share of a GPU ({rollout.share / 1e9:,.1f} GB) holds its weights "
              f"({rollout.weights / 1e9:,.1f} GB) but no key-value cache for one sequence")  # fmt: skip
    return [Limit(step, "engine", needed, rollout.share, reason)]
