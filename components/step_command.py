"""The command line of every step: `python -m components.<step>`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.command_line import CommandLine, first_paragraph
from components.config import RunConfig, load_run_config
from components.exit_codes import exit_code_of
from components.node import publish_config, run_folder, run_framed, write_outputs
from components.parameters import PARAMETERS, resolve_parameters
from components.runner import Step, execute
from tuneloop.errors import UserError


def main(step: Step, argv: Sequence[str] | None = None) -> int:
    """Run the step as the command line says; returns the exit code."""
    arguments = parser_of(step).parse_args(argv)

    def run() -> None:
        result = execute(step, _config(arguments), {n: getattr(arguments, n) for n in step.inputs}, arguments.output)
        if arguments.outputs:
            write_outputs(result, arguments.outputs)
        if arguments.node and step.name == "check":
            publish_config(arguments.output.rstrip("/"))

    if not arguments.node:
        return exit_code_of(run)
    return exit_code_of(lambda: _run_uri(arguments.output, step)) or run_framed(
        step.name, _run_uri(arguments.output, step), run
    )


def parser_of(step: Step) -> CommandLine:
    """The options of a step."""
    parser = CommandLine(prog=f"python -m components.{step.name}", description=first_paragraph(step.run))
    parser.add_argument("--config", required=True, help="the run's TOML or resolved JSON, a path or s3:// URI; or JSON")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    parser.add_argument(
        "--parameter", action="append", default=[], metavar="NAME=VALUE",
        help=f"set a parameter of the pipeline: {', '.join(PARAMETERS)}; empty or 0 is as in the config",
    )  # fmt: skip
    for name in step.inputs:
        required = name not in step.optional_inputs
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, required=required, metavar="URI")
    parser.add_argument("--output", required=True, metavar="URI", help="the folder to make, or an s3:// prefix")
    parser.add_argument("--outputs", type=Path, metavar="DIR", help="also write each value of the summary into a file")
    parser.add_argument(
        "--node", action="store_true",
        help=f"as a node of the pipeline: --output is <run>/{step.name}, and a failure is recorded beside it",
    )  # fmt: skip
    return parser


def _config(arguments: argparse.Namespace) -> RunConfig:
    config = load_run_config(arguments.config, tuple(arguments.set))
    given: dict[str, Any] = {}
    for text in arguments.parameter:
        name, equals, value = text.partition("=")
        if not equals or name not in PARAMETERS:
            raise UserError(f"--parameter {text!r}: write it as NAME=VALUE, with a name of {', '.join(PARAMETERS)}")
        given[name] = _value(name, value)
    if not given:
        return config
    return resolve_parameters(json.dumps(config.model_dump(mode="json")), given)


def _value(name: str, text: str) -> str | int | float:
    kind = PARAMETERS[name]
    try:
        return kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise UserError(f"--parameter {name}={text}: expected {expected}") from None


def _run_uri(output: str, step: Step) -> str:
    run, _, name = output.rstrip("/").rpartition("/")
    if name == step.name and not run:
        raise UserError(
            f"output_uri: is empty (--output {output}); name the run folder, such as s3://bucket/runs/first"
        )
    if name != step.name:
        raise UserError(f"--output {output}: with --node it is <run>/{step.name}")
    return run_folder(run, due="")
