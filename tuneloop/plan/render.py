"""The plan as a table to read."""

from tuneloop.plan.fit import Fit
from tuneloop.plan.inputs import PlanInputs, adapter_size
from tuneloop.plan.memory import StepMemory
from tuneloop.plan.plan import Plan

_SHOWN = 5  # items of the fullest phase


def render_head(inputs: PlanInputs, name: str) -> str:
    """What is planned: the model, the adapter, the longest sequences."""
    size = adapter_size(inputs)
    return (
        f"{name}: {_count(inputs.shape.parameters)} parameters in {inputs.dtype}, {len(inputs.targets)} adapted "
        f"modules with {_count(size.parameters)} parameters (rank {inputs.lora.rank}); {inputs.prompt_tokens} prompt + "
        f"{inputs.completion_tokens} new tokens; {inputs.rl.prompts_per_update} prompts x {inputs.rl.group_size}"
    )


def render_plan(plan: Plan, fit: Fit | None) -> str:
    """One kind of hardware: the verdict, what each step holds, the time, and what would fit."""
    cpu = plan.device.is_cpu
    where = "CPU" if cpu else f"{plan.gpus} x {plan.device.kind}"
    verdict = "does not fit" if not plan.fits else "fits, but tightly" if plan.is_tight else "fits"
    lines = [f"{where} ({_gb(plan.device.memory_bytes)}{'' if cpu else ' each'}): {verdict}"]
    for step in plan.steps:
        lines += _step_lines(step, plan)
    time = plan.time
    phases = ", ".join(f"{name} {_seconds(value)}" for name, value in time.update.items())
    lines.append(f"  an update {_seconds(time.update_seconds)} ({phases}); warm-up {_seconds(time.warm_up)}, "
                 f"{time.updates} updates, evaluation {_seconds(time.evaluation)}: {_seconds(time.run)}")  # fmt: skip
    lines += [
        f"  limit: {limit.where}: {limit.reason}: {_gb(limit.needed)} of {_gb(limit.room)}" for limit in plan.limits
    ]
    if not plan.fits:
        lines += _fit_lines(fit)
    return "\n".join(lines)


def render_refusal(reason: str, fit: Fit | None) -> str:
    """Settings that this many devices cannot meet, whatever their memory, and what would fit."""
    return "\n".join([reason, *_fit_lines(fit)])


def _step_lines(step: StepMemory, plan: Plan) -> list[str]:
    cpu = plan.device.is_cpu
    phase = step.host_peak if cpu else step.device_peak
    items = phase.host if cpu else phase.device
    largest = sorted(items.items(), key=lambda item: -item[1])[:_SHOWN]
    what = ", ".join(f"{name} {_gb(size)}" for name, size in largest if size)
    each = "" if cpu or step.gpus == 1 else " a GPU"
    host = "" if cpu else f"; host {_gb(step.host_peak.host_bytes)}"
    return [f"  {step.step:<11}{_gb(plan.peak(step)):>9}{each}{host}; most in {phase.name}: {what}"]


def _fit_lines(fit: Fit | None) -> list[str]:
    if fit is None:
        return ["  no change of the settings that only cost time makes it fit: more or larger GPUs, or a smaller model"]
    return [f"  fits ({_gb(fit.plan.needed)}) with", *(f"    {line}" for line in fit.toml())]


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.0f} MB"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _seconds(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
