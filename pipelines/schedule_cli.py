"""`python -m pipelines schedule apply | diff | list | pause | resume | delete`.

Imports neither torch, kfp nor kubernetes until a command runs.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.command_line import CommandLine
from pipelines.cluster_cli import TARGETS, add_connection, settings_of


def add_parser(commands: "argparse._SubParsersAction[CommandLine]") -> None:
    """Add the command; it sets `command`, which takes the arguments and returns the exit code."""
    schedule = commands.add_parser("schedule", help="run a pipeline again and again: apply, diff, list, pause, …")
    actions = schedule.add_subparsers(title="actions", required=True, metavar="ACTION")
    _add(actions, "apply", _apply, "have the cluster hold what the file declares, and nothing else of its owner")
    _add(actions, "diff", _diff, "show what apply would do")
    _add(actions, "list", _list, "show what the cluster has of the file's owner")
    _add(actions, "pause", _pause, "begin no tick until it is resumed or applied again", named=True)
    _add(actions, "resume", _resume, "begin ticks again", named=True)
    _add(actions, "delete", _delete, "remove one; apply makes it again while the file declares it", named=True)


def _add(
    actions: "argparse._SubParsersAction[CommandLine]", name: str, command: Callable[..., None], text: str,
    named: bool = False,
) -> None:  # fmt: skip
    parser = actions.add_parser(name, help=text)
    parser.add_argument("file", type=Path, metavar="FILE", help="TOML that declares the schedules")
    if named:
        parser.add_argument("name", metavar="NAME", help="of the schedule: tuneloop-<config name>")
    parser.add_argument(
        "--server-timezone", default="UTC", metavar="ZONE",
        help="with kfp: in which its controller reads cron, CRON_SCHEDULE_TIMEZONE (default: UTC)",
    )  # fmt: skip
    add_connection(parser, TARGETS)
    parser.set_defaults(command=command)


def _connect(arguments: argparse.Namespace) -> Any:
    from pipelines.cluster.schedules import read_namespace

    settings = settings_of(arguments, arguments.namespace or read_namespace(arguments.file))
    if arguments.target == "argo":
        from pipelines.cluster.argo_schedules import ArgoSchedules
        from pipelines.cluster.connection import KubeConnection

        return ArgoSchedules(KubeConnection(settings))
    from pipelines.cluster.connection import KfpConnection
    from pipelines.cluster.kfp_schedules import KfpSchedules

    return KfpSchedules(KfpConnection(settings), arguments.server_timezone)


def _apply(arguments: argparse.Namespace) -> None:
    from pipelines.cluster import schedules

    owner, declared = schedules.read_schedules(arguments.file, arguments.namespace)
    backend = _connect(arguments)
    schedules.apply(backend, schedules.compare(backend, owner, declared))


def _diff(arguments: argparse.Namespace) -> None:
    from pipelines.cluster import schedules

    owner, declared = schedules.read_schedules(arguments.file, arguments.namespace)
    for change in schedules.compare(_connect(arguments), owner, declared):
        print(f"{change.action:<8} {change.name}")


def _list(arguments: argparse.Namespace) -> None:
    from pipelines.cluster import schedules

    owner = schedules.read_owner(arguments.file)
    for one in sorted(_connect(arguments).existing(owner), key=lambda one: one.name):
        print(f"{one.name:<40} {'paused' if one.paused else 'active':<8} {'; '.join(one.cron)}")


def _pause(arguments: argparse.Namespace) -> None:
    _set_paused(arguments, True)


def _resume(arguments: argparse.Namespace) -> None:
    _set_paused(arguments, False)


def _set_paused(arguments: argparse.Namespace, paused: bool) -> None:
    from pipelines.cluster import schedules

    owner, backend = schedules.read_owner(arguments.file), _connect(arguments)
    for one in schedules.named(backend, owner, arguments.name):
        backend.pause(one, paused)
    print(f"{arguments.name}: {'paused' if paused else 'active'}")


def _delete(arguments: argparse.Namespace) -> None:
    from pipelines.cluster import schedules

    owner, backend = schedules.read_owner(arguments.file), _connect(arguments)
    for one in schedules.named(backend, owner, arguments.name):
        backend.delete(one)
    print(f"{arguments.name}: deleted; what it has started goes on")
