"""The nearest setting that fits: few changes before many, and those that cost nothing before those that cost time.

Each step has settings of its own, so each is searched by itself. What decides the result (rank, lengths, group size) is
left alone.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from tuneloop.errors import UserError
from tuneloop.plan.devices import Device
from tuneloop.plan.inputs import PlanInputs
from tuneloop.plan.plan import STEPS, Plan, make_plan, plan_step, step_limits
from tuneloop.rollout.settings import EngineSettings

_MOST_CHANGES = 4  # of one step
_HALVINGS = 6


@dataclass(frozen=True)
class Change:
    """One setting changed: `key = value` under `[table]`, and how much it is to be avoided."""

    table: str
    key: str
    value: Any
    cost: float

    @property
    def line(self) -> str:
        """The line to write under `[table]`."""
        value = json.dumps(self.value)  # of truths, numbers and plain strings, which TOML writes alike
        return f"{self.key} = {value}"


Allowed = Callable[[Sequence[Change]], bool]


@dataclass(frozen=True)
class Fit:
    """Changes with which a run fits, and its plan then."""

    changes: tuple[Change, ...]
    plan: Plan

    def toml(self) -> list[str]:
        """The lines to change, each under its table's heading."""
        tables: dict[str, list[str]] = {}
        for change in self.changes:
            tables.setdefault(change.table, []).append(change.line)
        return [line for table, lines in tables.items() for line in (f"[{table}]", *lines)]


def nearest_fit(
    inputs: PlanInputs, device: Device, gpus: int = 1, host_bytes: int = 0, *, allowed: Allowed = lambda changes: True
) -> Fit | None:
    """The cheapest changes with which every step fits; None when there are none.

    Args:
        allowed: whether a config may have these changes.
    """
    room = device.memory_bytes if device.is_cpu else host_bytes
    found: list[Change] = []
    for name in STEPS:
        changes = _nearest(name, inputs, device, gpus, room, allowed)
        if changes is None:
            return None
        found += changes
    return Fit(tuple(found), make_plan(_changed(inputs, found), device, gpus, host_bytes))


def _nearest(
    name: str, inputs: PlanInputs, device: Device, gpus: int, room: int, allowed: Allowed
) -> list[Change] | None:
    """The cheapest changes with which one step fits; empty when it does as it is."""
    choices = _CHOICES[name](inputs, device, gpus)
    for count in range(min(_MOST_CHANGES, len(choices)) + 1):
        sets = [list(changes) for chosen in combinations(choices, count) for changes in product(*chosen)]
        for changes in sorted(sets, key=lambda changes: sum(change.cost for change in changes)):
            try:
                changed = _changed(inputs, changes)
                if step_limits(plan_step(name, changed, device, gpus), changed, device, room):
                    continue
                if allowed(changes):
                    return changes
            except (UserError, ValueError):
                continue  # a combination that means nothing
    return None


def _halved(table: str, key: str, value: int, least: int) -> list[Change]:
    """Smaller budgets, down to `least`."""
    smaller = [value >> shift for shift in range(1, _HALVINGS + 1)]
    return [Change(table, key, size, 1.0 + 0.1 * step) for step, size in enumerate(smaller) if size >= least]


def _sft_choices(inputs: PlanInputs, device: Device, gpus: int) -> list[list[Change]]:
    choices = [_halved("sft_warmup", "micro_batch_tokens", inputs.sft.micro_batch_tokens, inputs.max_length)]
    if not inputs.sft.gradient_checkpointing:
        choices.append([Change("sft_warmup", "gradient_checkpointing", True, 1.5)])
    return _some(choices)


def _evaluate_choices(inputs: PlanInputs, device: Device, gpus: int) -> list[list[Change]]:
    choices = [_halved("evaluate", "max_sequences", inputs.evaluated, inputs.evaluation_samples)]
    if not device.is_cpu:
        if inputs.evaluation_engine.kind == "torch" and gpus > 1:
            choices.append([Change("evaluate.engine", "kind", "vllm", 1.5)])
        choices += _vllm_choices("evaluate.engine", inputs.evaluation_engine, gpus)
    return _some(choices)


def _rl_choices(inputs: PlanInputs, device: Device, gpus: int) -> list[list[Change]]:
    rl, engine = inputs.rl, "lora_rl.engine"
    choices = [_halved("lora_rl", "micro_batch_tokens", rl.micro_batch_tokens, inputs.max_length)]
    if not rl.gradient_checkpointing:
        choices.append([Change("lora_rl", "gradient_checkpointing", True, 1.5)])
    if rl.engine.kind == "torch":
        choices.append(_halved(engine, "max_sequences", rl.engine.max_sequences, rl.group_size))
    elif not device.is_cpu:
        choices += _vllm_choices(engine, rl.engine, gpus)
        if not rl.engine.sleep:
            choices.append([Change(engine, "sleep", True, 0.5)])
    return _some(choices if device.is_cpu else [*choices, *_spreading(inputs, gpus)])


def _vllm_choices(table: str, engine: EngineSettings, gpus: int) -> Iterator[list[Change]]:
    now, size = engine.gpu_memory_utilization, engine.tensor_parallel_size
    shares = [share / 10 for share in range(1, 10) if share / 10 != now]
    yield [Change(table, "gpu_memory_utilization", share, 0.5 + abs(share - now)) for share in shares]
    sizes = [other for other in (1, 2, 4, 8) if other != size and gpus % other == 0]
    yield [Change(table, "tensor_parallel_size", other, 1.0 + 0.01 * other) for other in sizes]


def _spreading(inputs: PlanInputs, gpus: int) -> Iterator[list[Change]]:
    settings, table = inputs.rl.distributed, "lora_rl.distributed"
    if settings.processes not in ("auto", gpus):
        yield [Change(table, "processes", gpus, 0.8)]
    if settings.zero_stage != 3:
        yield [Change(table, "zero_stage", 3, 2.0)]
    if not settings.offload_optimizer:
        yield [Change(table, "offload_optimizer", True, 2.0)]
    if not settings.offload_parameters:
        yield [Change(table, "offload_parameters", True, 3.0)]


def _some(choices: list[list[Change]]) -> list[list[Change]]:
    return [options for options in choices if options]


_CHOICES = {"sft_warmup": _sft_choices, "lora_rl": _rl_choices, "evaluate": _evaluate_choices}


def _changed(inputs: PlanInputs, changes: list[Change]) -> PlanInputs:
    """The inputs with the changes made.

    Raises:
        ValueError: they contradict each other.
    """
    for change in changes:
        section, _, nested = change.table.partition(".")
        if section == "sft_warmup":
            inputs = replace(inputs, sft=inputs.sft.model_copy(update={change.key: change.value}))
        elif nested and section == "evaluate":
            engine = inputs.evaluation_engine.model_copy(update={change.key: change.value})
            inputs = replace(inputs, evaluation_engine=engine)
        elif section == "evaluate":
            inputs = replace(inputs, evaluated=change.value)
        else:
            inputs = inputs.with_rl(**{f"{nested}__{change.key}" if nested else change.key: change.value})
    settings = inputs.rl.distributed
    if settings.offload_parameters and settings.zero_stage != 3:
        raise ValueError("offload_parameters needs zero_stage = 3")
    EngineSettings(**inputs.evaluation_engine.model_dump())
    return inputs
