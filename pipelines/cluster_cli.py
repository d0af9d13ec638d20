"""`python -m pipelines submit | status | logs`, and `report` of a run on a cluster.

Imports neither torch, kfp nor kubernetes until a command runs.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from components.command_line import CommandLine
from pipelines.steps import STEP_NAMES
from tuneloop.errors import UserError

TARGETS = ("kfp", "argo")
_ENDPOINT = "KF_PIPELINES_ENDPOINT"


def add_parsers(commands: "argparse._SubParsersAction[CommandLine]") -> None:
    """Add the three commands; each sets `command`, which takes the arguments and returns the exit code."""
    submit = commands.add_parser("submit", help="start a run on a cluster: Kubeflow Pipelines, Argo or Vertex AI")
    submit.add_argument("--config", required=True, metavar="FILE", help="TOML, or resolved JSON")
    submit.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    submit.add_argument("--output", required=True, metavar="URI", help="s3://bucket/prefix, the folder of all runs")
    submit.add_argument(
        "--run", metavar="NAME", help="name of the run (default: <config>-<digest of what it computes>)"
    )
    submit.add_argument("--again", action="store_true", help="another run, although this very one was submitted before")
    submit.add_argument("--wait", action="store_true", help="until the run ends; exit with its result")
    submit.add_argument("--watch", action="store_true", help="show the steps until the run ends; exit with its result")
    submit.add_argument("--package", type=Path, metavar="FILE", help="with vertex: where to write the package")
    add_connection(submit, (*TARGETS, "vertex"))
    submit.set_defaults(command=_submit)
    status = commands.add_parser("status", help="show a run on a cluster, or the newest ones")
    status.add_argument("run", nargs="?", metavar="RUN", help="its name or id (default: list the newest runs)")
    status.add_argument("--watch", action="store_true", help="until the run ends; exit with its result")
    add_connection(status, TARGETS)
    status.set_defaults(command=_status)
    logs = commands.add_parser("logs", help="print the log of a run on a cluster")
    logs.add_argument("run", metavar="RUN", help="its name or id")
    logs.add_argument(
        "step", nargs="?", choices=(*STEP_NAMES, "report"), metavar="STEP", help="one step (default: all)"
    )
    logs.add_argument("--follow", action="store_true", help="go on as long as the step runs")
    add_connection(logs, TARGETS)
    logs.set_defaults(command=_logs)


def add_doctor(commands: "argparse._SubParsersAction[CommandLine]") -> None:
    """Add the command that looks at a cluster before the first run."""
    doctor = commands.add_parser("doctor", help="look at a cluster before the first run: what is missing, what to do")
    doctor.add_argument("--config", required=True, metavar="FILE", help="TOML, or resolved JSON")
    doctor.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a setting")
    doctor.add_argument("--output", required=True, metavar="URI", help="s3://bucket/prefix, the folder of all runs")
    add_connection(doctor, TARGETS)
    doctor.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> None:
    from pipelines.cluster.doctor import examine, require_healthy

    config = _config_of(arguments)
    settings = settings_of(arguments, config.cluster.namespace)
    findings = []
    for found in examine(config, arguments.output, arguments.target or "kfp", settings):
        print(f"{found.state:<8} {found.what}: {found.text}", flush=True)
        findings.append(found)
    require_healthy(findings)


def add_connection(parser: argparse.ArgumentParser, targets: tuple[str, ...]) -> None:
    """Add the options that name a server; tokens and cookies come from the environment alone."""
    group = parser.add_argument_group("the cluster", "tokens and cookies: environment variables of docs/submit.md")
    group.add_argument("--target", choices=targets, help="what runs the pipeline (default: kfp)")
    group.add_argument("--host", default="", metavar="URL", help=f"Kubeflow Pipelines (default: ${_ENDPOINT})")
    group.add_argument("--namespace", default="", metavar="NAME", help="of the run (default: [cluster] namespace)")
    group.add_argument("--kfp-namespace", default="kubeflow", metavar="NAME", help="where Kubeflow Pipelines itself is")
    group.add_argument("--context", default="", metavar="NAME", help="of the kubeconfig (default: its current one)")
    group.add_argument("--ca-file", default="", metavar="FILE", help="certificates that sign the server's")
    group.add_argument("--iap-client-id", default="", metavar="ID", help="of Google's Identity-Aware Proxy")
    group.add_argument("--ui-host", default="", metavar="URL", help="the console, for links (default: --host)")
    group.add_argument(
        "--patience", type=_seconds, default=120.0, metavar="SECONDS",
        help="how long a server may be away before we give up (default: 120)",
    )  # fmt: skip


def names_a_cluster(arguments: argparse.Namespace, here: bool) -> bool:
    """Whether a run is looked for on a cluster: the options say so, or the environment of what is not found here."""
    options = (arguments.target, arguments.host, arguments.context, arguments.namespace)
    return any(options) or (bool(os.environ.get(_ENDPOINT)) and not here)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 86_400.0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def settings_of(arguments: argparse.Namespace, namespace: str = "") -> Any:
    """The connection that the options of `add_connection` name."""
    from components.cluster_config import ClusterConfig
    from pipelines.cluster.connection import ConnectionSettings

    names = ("host", "kfp_namespace", "context", "ca_file", "iap_client_id", "ui_host")
    return ConnectionSettings(
        **{name: getattr(arguments, name) for name in names},
        namespace=arguments.namespace or namespace or ClusterConfig().namespace,
        patience_seconds=arguments.patience,
    )


def _connect(target: str | None, settings: Any) -> Any:
    if target == "argo":
        from pipelines.cluster.argo_runs import ArgoRuns
        from pipelines.cluster.connection import KubeConnection

        return ArgoRuns(KubeConnection(settings), settings.ui_host)
    from pipelines.cluster.connection import KfpConnection
    from pipelines.cluster.kfp_runs import KfpRuns

    return KfpRuns(KfpConnection(settings))


def _submit(arguments: argparse.Namespace) -> int:
    from components.cluster_config import ClusterConfig
    from pipelines.cluster import submit as submitting

    config = _config_of(arguments)
    if arguments.target == "vertex":
        if arguments.wait or arguments.watch or arguments.again:
            raise UserError("--target vertex: writes a package and starts nothing; drop --wait, --watch and --again")
        print(submitting.write_vertex_package(config, arguments.output, arguments.package, arguments.run))
        return 0
    if arguments.package:
        raise UserError("--package: is of --target vertex alone")
    settings = settings_of(arguments, config.cluster.namespace)
    backend, run, _ = submitting.submit(
        config, arguments.output, lambda: _connect(arguments.target, settings), arguments.run, arguments.again
    )
    if settings.namespace != ClusterConfig().namespace:
        arguments.namespace = settings.namespace  # which the commands that read no config have to be told
    look = _same_cluster(arguments, run.name)
    if not (arguments.wait or arguments.watch):
        print(f"look at it with: {look}", flush=True)
        return 0
    from pipelines.cluster.watch import follow

    return follow(backend, run, look, show=arguments.watch)


def _config_of(arguments: argparse.Namespace) -> Any:
    from components.config import load_run_config

    overrides = (*arguments.set, *([f"cluster.namespace={arguments.namespace}"] if arguments.namespace else []))
    return load_run_config(arguments.config, overrides)


def _same_cluster(arguments: argparse.Namespace, run: str) -> str:
    """The command that shows the run, with the options that name the same cluster."""
    command = ["python", "-m", "pipelines", "status", run]
    for option in ("target", "host", "namespace", "context", "ca_file", "iap_client_id", "ui_host"):
        if value := getattr(arguments, option):
            command += [f"--{option.replace('_', '-')}", value]
    if arguments.kfp_namespace != "kubeflow":
        command += ["--kfp-namespace", arguments.kfp_namespace]
    return shlex.join(command)


def _find(arguments: argparse.Namespace) -> tuple[Any, Any]:
    backend = _connect(arguments.target, settings_of(arguments))
    run = backend.find(arguments.run)
    if run is None:
        newest = ", ".join(dict.fromkeys(found.name for found in backend.newest(20)[:3]))
        hint = f"the newest are {newest}" if newest else "there are none"
        raise UserError(f"{arguments.run}: no such run on the cluster; {hint}")
    return backend, run


def _status(arguments: argparse.Namespace) -> int:
    from pipelines.cluster.watch import follow, listing, show_once

    if not arguments.run:
        if arguments.watch:
            raise UserError("--watch: shows one run; name it")
        print(listing(_connect(arguments.target, settings_of(arguments)).newest(20)))
        return 0
    backend, run = _find(arguments)
    if arguments.watch:
        return follow(backend, run, _same_cluster(arguments, run.name), show=True)
    show_once(backend, run)
    return 0


def _logs(arguments: argparse.Namespace) -> int:
    from pipelines.cluster.connection import KubeConnection
    from pipelines.cluster.pods import print_logs

    settings = settings_of(arguments)
    backend, run = _find(arguments)
    print_logs(KubeConnection(settings), backend, run, arguments.step, arguments.follow, sys.stdout)
    return 0


def report(arguments: argparse.Namespace) -> None:
    """Fetch the report of a run on the cluster into a local file, and print where it is."""
    from pipelines.cluster.result import fetch_report

    _, run = _find(arguments)
    print(f"report: {fetch_report(run, arguments.to)}")
