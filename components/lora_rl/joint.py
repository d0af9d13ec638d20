"""Several runs' lora_rl in one process, over one copy of the base model and one engine.

    python -m components.lora_rl.joint --config a.toml --data DIR --warmup DIR --output DIR \\
                                       --config b.toml --data DIR --warmup DIR --output DIR

Each output is the one that `python -m components.lora_rl` makes of the same config, adapter and all.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.command_line import CommandLine
from components.config import RunConfig, load_run_config
from components.exit_codes import exit_code_of
from components.failures import StepFailure, record_failure
from components.lora_rl.step import STEP, leave
from components.result import Summary
from components.runner import execute
from tuneloop.errors import UserError
from tuneloop.storage import local_path


@dataclass(frozen=True)
class Part:
    """One run's part: its config, the URIs of its inputs by name, and of its output."""

    config: RunConfig
    inputs: Mapping[str, str]
    output: str


def require_one_base(configs: Sequence[RunConfig]) -> None:
    """Refuse runs that cannot be trained in one process, over one base and one engine.

    Raises:
        UserError: in one line, which of them and why.
    """
    first = configs[0]
    if len({config.name for config in configs}) < len(configs):
        names = ", ".join(config.name for config in configs)
        raise UserError(f"two runs have the same name ({names}): give each its own")
    shared = {config.name: _shared_settings(config) for config in configs}
    for config in configs[1:]:
        for setting, value in shared[first.name].items():
            other = shared[config.name][setting]
            if other != value:
                raise UserError(f"{first.name} and {config.name} differ in {setting} ({value} and {other}), and one "
                                "process holds one: make them equal, or run them apart")  # fmt: skip
    for config in configs:
        full = [section for section in ("sft_warmup", "lora_rl") if getattr(config, section).mode == "full"]
        if full:
            raise UserError(f'{config.name}: {full[0]}.mode = "full" changes the base, which is shared: run it apart')
        distributed = config.lora_rl.distributed
        together = distributed.processes not in ("auto", 1) or distributed.launcher != "inline"
        if together or distributed.offloads:
            raise UserError(f"{config.name}: lora_rl.distributed asks for several processes or for offloading, and "
                            "several runs are trained in one process: leave it out, or run it apart")  # fmt: skip


def _shared_settings(config: RunConfig) -> dict[str, object]:
    engine = config.lora_rl.engine
    shared: dict[str, object] = {"model.uri": config.model.uri, "model.dtype": config.model.dtype}
    shared |= {f"lora_rl.engine.{key}": value for key, value in engine if key != "canary_tolerance"}
    if engine.kind == "vllm":  # which reports the log-probs of one kind of sampling
        shared["lora_rl.sampling"] = config.lora_rl.sampling.model_dump()
    return shared


def execute_together(parts: Sequence[Part]) -> None:
    """Run all parts, or find that some have already been run; a failure leaves `lora_rl.failed.json` beside each.

    Raises:
        UserError: they cannot be trained together, an input is damaged, or an output holds something else.
        TryAgain: told to stop; the state of all is saved.
    """
    require_one_base([part.config for part in parts])
    outputs = [str(local_path(part.output).resolve()) for part in parts]
    if len(set(outputs)) < len(outputs):
        raise UserError("two runs have the same output: give each its own")
    _execute(list(parts), {})


def _execute(left: list[Part], waiting: dict[str, tuple[RunConfig, Mapping[str, Path], Path]]) -> dict[str, Summary]:
    """Hold the outputs of all that are left to run, one within the other, and train innermost."""
    if not left:
        return _train(waiting) if waiting else {}
    part, rest = left[0], left[1:]
    summaries: dict[str, Summary] | None = None

    def run(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Summary:
        nonlocal summaries
        summaries = _execute(rest, {**waiting, config.name: (config, inputs, output)})
        return summaries[config.name]

    execute(replace(STEP, run=run), part.config, part.inputs, part.output)
    return _execute(rest, waiting) if summaries is None else summaries  # None: it had been run before


def _train(parts: Mapping[str, tuple[RunConfig, Mapping[str, Path], Path]]) -> dict[str, Summary]:
    from components.lora_rl.training import load_base, make_trainer, read_member
    from tuneloop.models.lora import install
    from tuneloop.training.joint import train_in_turns
    from tuneloop.training.stopping import StopRequest

    members = {name: read_member(*part) for name, part in parts.items()}
    stopping = StopRequest(min(member.settings.stop_grace_seconds for member in members.values()))
    base = load_base(list(members.values()))
    with closing(base.engine):
        trainers = {}
        for name, member in members.items():
            print(f"{name}:", flush=True)
            install(base.model, {})  # an adapter is attached to a model that has none
            trainers[name] = make_trainer(member, base, name, stopping)
        results = train_in_turns(trainers, stopping)
    return {name: leave(members[name], trainer, results[name]) for name, trainer in trainers.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = CommandLine(prog="python -m components.lora_rl.joint", description="Train several runs' adapters at once.")
    parser.add_argument("--config", action="append", required=True, help="a run's TOML, or resolved JSON; once a run")
    for name in STEP.inputs:
        parser.add_argument(f"--{name}", action="append", required=True, metavar="URI", help="once a run")
    parser.add_argument(
        "--output", action="append", required=True, metavar="PATH", help="the folder to make; once a run"
    )
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override in all runs")
    parser.add_argument("--record-failures", action="store_true", help=argparse.SUPPRESS)  # by the pipeline
    arguments = parser.parse_args(argv)

    def on_failure(code: int, message: str) -> None:
        if arguments.record_failures:
            for output in arguments.output:
                record_failure(str(local_path(output).parent), StepFailure(STEP.name, code, message))

    return exit_code_of(lambda: execute_together(_parts(arguments)), on_failure)


def _parts(arguments: Any) -> list[Part]:
    counts = {name: len(getattr(arguments, name)) for name in ("config", *STEP.inputs, "output")}
    if len(set(counts.values())) > 1:
        given = ", ".join(f"{count} --{name}" for name, count in counts.items())
        raise UserError(f"each run needs one of every option, but there are {given}")
    parts = []
    for number, path in enumerate(arguments.config):
        inputs = {name: getattr(arguments, name)[number] for name in STEP.inputs}
        config = load_run_config(path, tuple(arguments.set))
        parts.append(Part(config, inputs, arguments.output[number]))
    return parts


if __name__ == "__main__":
    sys.exit(main())
