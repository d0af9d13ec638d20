"""`python -m pipelines registry list | show | promote | rollback`."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from tuneloop.errors import UserError
from tuneloop.registry import PRODUCTION, ListedVersion, Registry


def add_parser(subparsers: Any) -> None:
    """Add `registry` and its sub-commands to the command line; each sets `command`, which takes the arguments."""
    registry = subparsers.add_parser("registry", help="list, show, promote and roll back adapter versions")
    actions = registry.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add(actions, "list", _list, "list the versions of one adapter or of all")
    show = _add(actions, "show", _show, "show one version: its base, data, evaluation and files", alias=True)
    show.add_argument("--version", type=int, metavar="N", help="the version (default: what the alias names)")
    promote = _add(actions, "promote", _promote, "move an alias to a version", alias=True)
    promote.add_argument("--version", type=int, metavar="N", required=True, help="the version")
    _add(actions, "rollback", _rollback, "move an alias back to the version before", alias=True)


def _add(
    actions: Any, name: str, command: Callable[[argparse.Namespace], None], text: str, alias: bool = False
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=text)
    parser.add_argument(
        "--registry", default="registry", metavar="URI", help="a folder or s3://bucket/prefix (default: registry)"
    )
    parser.add_argument("--name", default="", metavar="ADAPTER", help="the adapter (default: the only one there is)")
    if alias:
        parser.add_argument("--alias", default=PRODUCTION, metavar="ALIAS", help=f"the alias (default: {PRODUCTION})")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=command)
    return parser


def _list(arguments: argparse.Namespace) -> None:
    rows = Registry(arguments.registry).list(arguments.name)
    if arguments.json:
        _print_json([asdict(row) for row in rows])
    elif not rows:
        print(f"{arguments.registry}: no adapters yet")
    else:
        heads = ("ADAPTER", "VERSION", "ALIASES", "ACCURACY", "PARENT", "CREATED", "DIGEST")
        print(_table([heads, *map(_cells, rows)]))


def _show(arguments: argparse.Namespace) -> None:
    registry = Registry(arguments.registry)
    name = _adapter_name(registry, arguments.name)
    number = registry.alias(name, arguments.alias).version if arguments.version is None else arguments.version
    record = dict(registry.show(name, number).record)
    if arguments.json:
        _print_json(record)
        return
    gate = record.get("evaluation", {}).get("gate", {})
    accuracies = record.get("evaluation", {}).get("accuracy", {})
    aliases = [alias for alias, moved in registry.aliases(name).items() if moved.version == number]
    rows = [("adapter", name), ("version", str(number)), ("aliases", ", ".join(aliases) or "-")]
    for field in ("created_at", "parent", "base_uri", "adapter_digest", "data_fingerprint", "config_digest",
                  "code_version"):  # fmt: skip
        rows.append((field.replace("_", " "), _text(record.get(field))))
    rows += [(f"accuracy {model}", _interval(accuracy)) for model, accuracy in accuracies.items()]
    rows.append(("gate", _text(gate.get("reason"))))
    rows += [("file", f"{digest[:12]}  {file}") for file, digest in record["files"].items()]
    print(_table(rows))


def _promote(arguments: argparse.Namespace) -> None:
    registry = Registry(arguments.registry)
    name = _adapter_name(registry, arguments.name)
    current = registry.aliases(name).get(arguments.alias)
    moved = registry.promote(name, arguments.version, arguments.alias, current.version if current else None)
    _print_moved(arguments, name, asdict(moved), current.version if current else None)


def _rollback(arguments: argparse.Namespace) -> None:
    registry = Registry(arguments.registry)
    name = _adapter_name(registry, arguments.name)
    before = registry.alias(name, arguments.alias).version
    _print_moved(arguments, name, asdict(registry.rollback(name, arguments.alias)), before)


def _print_moved(arguments: argparse.Namespace, name: str, moved: dict[str, Any], before: int | None) -> None:
    if arguments.json:
        _print_json({"adapter_name": name, "alias": arguments.alias, **moved})
    elif before == moved["version"]:
        print(f"{name} {arguments.alias}: already version {before}")
    else:
        print(f"{name} {arguments.alias}: version {moved['version']}" + (f", was {before}" if before else ""))


def _adapter_name(registry: Registry, given: str) -> str:
    names = [given] if given else registry.names()
    if len(names) == 1:
        return names[0]
    there = f"holds {len(names)} adapters ({', '.join(names)}); choose one by --name" if names else "holds no adapters"
    raise UserError(f"{registry.uri}: {there}")


def _cells(row: ListedVersion) -> Sequence[str]:
    aliases = ", ".join(row.aliases) or "-"
    if row.problem:
        return (row.adapter_name, str(row.version), aliases, f"damaged: {row.problem}")
    record = row.record
    accuracy = record.get("evaluation", {}).get("accuracy", {}).get("candidate")
    created, digest = _text(record.get("created_at")), record["adapter_digest"][:12]
    return (
        row.adapter_name,
        str(row.version),
        aliases,
        _percent(accuracy),
        _text(record.get("parent")),
        created,
        digest,
    )


def _percent(accuracy: Any) -> str:
    return f"{accuracy['value']:.1%}" if accuracy else "-"


def _interval(accuracy: Any) -> str:
    if not accuracy:
        return "-"
    low, high = accuracy["ci95"]
    return f"{accuracy['value']:.1%}  ({low:.1%} to {high:.1%}, {accuracy['n']} prompts)"


def _text(value: Any) -> str:
    return "-" if value in (None, "") else str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    width = max(len(row) for row in rows)
    # The last cell of a row may be long and does not widen its column.
    widths = [max((len(row[i]) for row in rows if i < len(row) - 1), default=0) for i in range(width)]
    lines = ("  ".join(cell.ljust(widths[i]) for i, cell in enumerate(row)).rstrip() for row in rows)
    return "\n".join(lines)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
