"""Whether the run fits the hardware that it is meant for."""

import os
from pathlib import Path
from typing import Any

from components.check.plan_inputs import may_change, plan_inputs
from components.config import RunConfig
from tuneloop.errors import UserError
from tuneloop.plan.devices import Device, find_gpu, machine_memory_bytes
from tuneloop.plan.fit import nearest_fit
from tuneloop.plan.inputs import PlanInputs
from tuneloop.plan.plan import Plan, make_plan
from tuneloop.plan.render import render_plan
from tuneloop.plan.shapes import read_shape


def check_hardware(config: RunConfig, model_folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Plan memory and time on `[check] gpu`; with none named, memory on this machine, if it is the one that trains.

    Args:
        config: the run's.
        model_folder: of the base model; only its config.json and the size of tokenizer.json are read.

    Returns:
        The plan for plan.json, and what could not be verified.

    Raises:
        UserError: it cannot fit; the message says what limits it and what to change.
    """
    try:
        shape = read_shape(model_folder / "config.json")
    except UserError as error:
        return None, [f"memory: {error}"]
    inputs = plan_inputs(config, shape, model_folder / "tokenizer.json")
    device, gpus, host = _hardware(config)
    if device is None:
        return None, ["memory: which GPU trains is not known; name its kind in [check] gpu"]
    plan = make_plan(inputs, device, gpus, host)
    print(render_plan(plan, None), flush=True)
    if not plan.fits:
        raise UserError(refusal(plan, inputs, config))
    tight = [f"memory: the plan needs {plan.needed / device.memory_bytes:.0%} of it, which is within the plan's error"]
    return plan.record(), tight if plan.is_tight else []


def refusal(plan: Plan, inputs: PlanInputs, config: RunConfig) -> str:
    """One line: what limits the run, and the nearest setting that fits."""
    limit = plan.limits[0]
    where = "this machine" if plan.device.is_cpu else f"{plan.gpus} x {plan.device.kind}"
    fit = nearest_fit(inputs, plan.device, plan.gpus, plan.host_bytes, allowed=may_change(config))
    advice = "use more or larger GPUs, or a smaller model" if not plan.device.is_cpu else "use a smaller model"
    if fit:
        changed = ", ".join(f"{change.table}.{change.line}" for change in fit.changes)
        advice = f"it fits with {changed}"
    return (f"does not fit {where}: {limit.reason}, {limit.needed / 1e9:,.1f} of {limit.room / 1e9:,.1f} GB in all; "
            f"{advice}")  # fmt: skip


def _hardware(config: RunConfig) -> tuple[Device | None, int, int]:
    """(device, how many, the host's memory); no device when another machine trains, of which nothing is known."""
    check = config.check
    if check.gpu:
        return find_gpu(check.gpu), check.gpus, check.host_memory_bytes
    elsewhere = "KUBERNETES_SERVICE_HOST" in os.environ  # this pod only checks
    if (elsewhere and not check.host_memory_bytes) or Path("/dev/nvidia0").exists():
        return None, 0, 0
    memory = check.host_memory_bytes or machine_memory_bytes()
    return Device("cpu", memory, 1e12, 1e11, 1e11, 1e11), 1, memory  # how fast is of no matter to what fits
