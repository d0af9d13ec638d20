"""The command line: `python -m pipelines run | submit | status | logs | report | compile | config | plan | registry`.

Imports of torch and kfp stay inside the commands that need them, so that help and validation are quick.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from components.command_line import CommandLine
from pipelines import cluster_cli, schedule_cli
from pipelines.steps import STEP_NAMES
from tuneloop.errors import TryAgain, TuneloopError, UserError
from tuneloop.storage import is_remote, local_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: as in `tuneloop.errors`, 3 when the gate said no."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser(with_registry=argv[:1] == ["registry"], with_plan=argv[:1] == ["plan"]).parse_args(argv)
    from components.exit_codes import exit_code_of

    code = 0

    def action() -> None:
        nonlocal code
        try:
            code = arguments.command(arguments) or 0
            sys.stdout.flush()
        except BrokenPipeError:  # the reader, such as head, has seen enough; what is left to print goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return exit_code_of(action) or code


def _parser(with_registry: bool, with_plan: bool) -> CommandLine:
    parser = CommandLine(prog="python -m pipelines", description="Train a LoRA adapter, prove it better, promote it.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    cluster_cli.add_parsers(commands)
    schedule_cli.add_parser(commands)
    cluster_cli.add_doctor(commands)
    report = commands.add_parser("report", help="write the report of a run again, or fetch it from a cluster")
    report.add_argument("run", metavar="RUN", help="folder, s3:// URI, or name under --output or on a cluster")
    report.add_argument("--output", default="runs", metavar="FOLDER", help="the folder of all runs (default: runs)")
    report.add_argument("--to", type=Path, metavar="FILE", help="a copy of it (default: none; from a cluster RUN.html)")
    cluster_cli.add_connection(report, cluster_cli.TARGETS)
    report.set_defaults(command=_report)
    _add_compile(commands)
    config = commands.add_parser("config", help="print a config with every default filled in")
    source = config.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", metavar="FILE", help="TOML, or resolved JSON")
    source.add_argument("--schema", action="store_true", help="print the JSON schema of a config instead")
    _add_set(config)
    config.set_defaults(command=_config)
    if with_plan:
        from pipelines import plan_cli

        plan_cli.add_parser(commands)
    else:
        commands.add_parser("plan", help="predict memory and time of a run, and what fits")
    if with_registry:
        from pipelines import registry_cli

        registry_cli.add_parser(commands)
    else:
        commands.add_parser("registry", help="list, show, promote and roll back adapter versions")
    return parser


def _add_run(commands: "argparse._SubParsersAction[CommandLine]") -> None:
    run = commands.add_parser("run", help="run the whole pipeline on this machine, or continue a run")
    what = run.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--config", action="append", metavar="FILE",
        help="TOML, or resolved JSON: start a new run; several train their adapters together, over one base model",
    )  # fmt: skip
    what.add_argument(
        "--resume", action="append", metavar="RUN",
        help="continue a run: its folder, or its name under --output; several are trained together",
    )  # fmt: skip
    _add_set(run)
    run.add_argument("--output", default="runs", metavar="FOLDER", help="the folder of all runs (default: runs)")
    run.add_argument(
        "--run", action="append", metavar="NAME",
        help="name of the new run (default: <config>-<UTC time>-<digest>); with several, one for each, in their order",
    )  # fmt: skip
    run.add_argument(
        "--from", dest="start", choices=STEP_NAMES, metavar="STEP",
        help=f"with --resume: run this step and all later ones again ({', '.join(STEP_NAMES)})",
    )  # fmt: skip
    run.set_defaults(command=_run)


def _add_compile(commands: "argparse._SubParsersAction[CommandLine]") -> None:
    compile_ = commands.add_parser("compile", help="write the pipeline for Kubeflow, Vertex, Argo and GitOps")
    compile_.add_argument("--config", metavar="FILE", help="TOML, or resolved JSON (default: configs/cluster.toml)")
    _add_set(compile_)
    compile_.add_argument(
        "--target", choices=("all", "kubernetes", "portable", "argo", "gitops"), default="all",
        help="which rendering (default: all)",
    )  # fmt: skip
    compile_.add_argument("--output", metavar="FOLDER", help="where to write it (default: pipelines/compiled)")
    compile_.add_argument("--check", action="store_true", help="compare with what is there, write nothing")
    compile_.set_defaults(command=_compile)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")


def _run(arguments: argparse.Namespace) -> int:
    if arguments.resume:
        return _resume(arguments)
    if arguments.start:
        raise UserError(f"--from {arguments.start}: works on an existing run; add --resume RUN")
    from components.config import load_run_config
    from pipelines import joint, runs

    configs = [load_run_config(file, tuple(arguments.set)) for file in arguments.config]
    if arguments.run and len(arguments.run) != len(configs):
        raise UserError(f"there are {len(configs)} --config and {len(arguments.run)} --run: name all runs, or none")
    joint.require_joint(configs)
    if is_remote(arguments.output):
        from pipelines import remote_runs

        _require_one(configs, arguments.output)
        return _run_pipeline(configs[0], remote_runs.create_run(configs[0], arguments.output, *arguments.run or []))
    with runs.create_runs(configs, arguments.output, arguments.run) as folders:
        return _run_into(configs, folders)


def _resume(arguments: argparse.Namespace) -> int:
    from pipelines import joint, runs

    if arguments.run:
        raise UserError(f"--run {arguments.run[0]}: names a new run, and --resume continues one; drop one of the two")
    if any(map(is_remote, arguments.resume)):
        from pipelines import remote_runs

        _require_one(arguments.resume, arguments.resume[0])
        if arguments.set or arguments.start:
            raise UserError("--set and --from change a run on this machine; start a new run in the object store")
        return _run_pipeline(remote_runs.find_run(arguments.resume[0]), arguments.resume[0].rstrip("/"))
    folders = [runs.find_run(run, arguments.output) for run in arguments.resume]
    with runs.run_locks(folders):
        configs = [runs.resume_config(folder, tuple(arguments.set), arguments.start) for folder in folders]
        joint.require_joint(configs)
        for config, folder in zip(configs, folders, strict=True):
            for path in runs.clear(folder, arguments.start, config):
                print(f"removed {path}", flush=True)
        return _run_into(configs, folders)


def _run_into(configs, folders: list[Path]) -> int:
    if len(folders) == 1:
        return _run_pipeline(configs[0], str(folders[0]))
    from pipelines.joint import run_jointly

    return run_jointly(list(zip(configs, folders, strict=True)))


def _require_one(runs: Sequence[object], where: str) -> None:
    if len(runs) > 1:
        raise UserError(f"{where}: several runs are trained together in folders of one machine; run each alone")


def _run_pipeline(config, run: str) -> int:
    print(f"run: {run}", flush=True)
    again = f"python -m pipelines run --resume {shlex.quote(run)}"
    from pipelines.local import run_locally
    from pipelines.summary import exit_code, report_after_failure, summary
    from tuneloop.report import fetched_run

    try:
        run_locally(config, run)
    except TryAgain as error:
        raise TryAgain(f"{error}; continue with: {again}") from None
    except TuneloopError:
        report_after_failure(run)  # the pipeline's own one was made before the cause was known
        print(f"once the cause is gone, continue with: {again}", flush=True)
        raise
    with fetched_run(run) as folder:
        print(summary(folder, run), flush=True)
        return exit_code(folder)


def _report(arguments: argparse.Namespace) -> None:
    from pipelines.runs import find_run, is_run
    from pipelines.summary import copy_report, report_line
    from tuneloop.report import report_of

    here = is_remote(arguments.run) or is_run(arguments.run, arguments.output)
    if cluster_cli.names_a_cluster(arguments, here):
        cluster_cli.report(arguments)
        return
    run = arguments.run if is_remote(arguments.run) else str(find_run(arguments.run, arguments.output))
    with report_of(run) as folder:
        print(report_line(run) if arguments.to is None else f"report: {copy_report(folder, arguments.to)}")


def _compile(arguments: argparse.Namespace) -> None:
    from components.config import load_run_config
    from pipelines import compile as compiling

    config = load_run_config(arguments.config or compiling.CONFIG, tuple(arguments.set))
    folder = local_path(arguments.output) if arguments.output else compiling.COMPILED
    if (arguments.config or arguments.set) and not arguments.output:
        raise UserError(
            "--output: pipelines/compiled is of configs/cluster.toml alone; name a folder for another config"
        )
    targets = compiling.TARGETS if arguments.target == "all" else (arguments.target,)
    if arguments.check:
        compiling.check_compiled(config, folder, targets)
        print(f"{folder}: up to date")
        return
    for path in compiling.compile_pipeline(config, folder, targets):
        print(f"wrote {path}")


def _config(arguments: argparse.Namespace) -> None:
    from components.config import RunConfig, load_run_config
    from tuneloop.config import resolved_json

    if arguments.schema:
        print(json.dumps(RunConfig.model_json_schema(), indent=2, sort_keys=True))
    else:
        print(resolved_json(load_run_config(arguments.config, tuple(arguments.set))), end="")
