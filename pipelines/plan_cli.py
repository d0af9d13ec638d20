"""`python -m pipelines plan`: memory and time of a run on GPUs or on this CPU, before anything runs.

Reads the config and the model's config.json; imports neither torch nor kfp.
"""

import argparse
import contextlib
import json
import math
from pathlib import Path
from typing import Any

from tuneloop.errors import UserError
from tuneloop.plan.devices import GPUS, Device, find_gpu, measure_cpu

DESCRIPTION = (
    "Predict peak memory and time from the config and the model's config.json alone; no weights are loaded. Says "
    "whether the run fits, what limits it, and the nearest settings that fit."
)


def add_parser(subparsers: Any) -> None:
    """Add `plan` to the command line; it sets `command`, which takes the arguments and returns the exit code."""
    plan = subparsers.add_parser(
        "plan", help="predict memory and time of a run, and what fits", description=DESCRIPTION
    )
    plan.add_argument("--config", required=True, metavar="FILE", help="TOML, or resolved JSON")
    plan.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    plan.add_argument(
        "--gpu", nargs="+", default=[], metavar="KIND",
        help=f"all, cpu, or of {', '.join(GPUS)} (default: [check] gpu, or this machine's CPU)",
    )  # fmt: skip
    plan.add_argument("--gpus", type=_count, metavar="N", help="GPUs in the machine (default: [check] gpus)")
    plan.add_argument(
        "--host-memory", type=_gigabytes, default=0.0, metavar="GB", help="the machine's memory, if known"
    )
    plan.add_argument("--model-config", metavar="FILE", help="a copy of the model's config.json, if it is not here")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(command=_plan)


def _gigabytes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number of gigabytes")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of GPUs")
    return int(text)


def _plan(arguments: argparse.Namespace) -> int:
    """Exit code 2 when it fits none of the kinds that were asked for."""
    from components.check.plan_inputs import may_change, plan_inputs
    from components.config import load_run_config
    from tuneloop.plan.fit import nearest_fit
    from tuneloop.plan.plan import make_plan
    from tuneloop.plan.render import render_head, render_plan, render_refusal
    from tuneloop.plan.shapes import read_shape

    config = load_run_config(arguments.config, tuple(arguments.set))
    inputs = plan_inputs(config, read_shape(Path(arguments.model_config)) if arguments.model_config else None)
    gpus = arguments.gpus or config.check.gpus
    here = int(arguments.host_memory * 1e9)
    devices = _devices(arguments.gpu or [config.check.gpu or "cpu"], here)
    allowed = may_change(config)
    records, texts, fits = [], [render_head(inputs, config.name)], False
    for device in devices:
        count = 1 if device.is_cpu else gpus
        host = here or (0 if device.is_cpu else config.check.host_memory_bytes)
        try:
            plan = make_plan(inputs, device, count, host)
        except UserError as error:
            fit = nearest_fit(inputs, device, count, host, allowed=allowed)
            lines = fit.toml() if fit else None
            records.append({"device": device.kind, "gpus": count, "fits": False, "error": str(error), "nearest": lines})
            texts.append(render_refusal(f"{count} x {device.kind}: {error}", fit))
            continue
        fit = None if plan.fits else nearest_fit(inputs, device, count, host, allowed=allowed)
        fits = fits or plan.fits
        records.append({**plan.record(), "nearest": fit.toml() if fit else None})
        texts.append(render_plan(plan, fit))
    print(json.dumps({"name": config.name, "plans": records}, indent=2) if arguments.json else "\n\n".join(texts))
    return 0 if fits else 2


def _devices(kinds: list[str], host_bytes: int) -> list[Device]:
    names = [name for kind in kinds for name in (GPUS if kind == "all" else (kind,))]
    return [measure_cpu(host_bytes) if name == "cpu" else find_gpu(name) for name in dict.fromkeys(names)]
