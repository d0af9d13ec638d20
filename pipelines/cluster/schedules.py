"""Schedules as they are declared, and what has to change on a cluster so that it has those and no others.

A file names the configs; each config's `[cluster.schedule]` says when. What a file once declared and declares no longer
is removed, which the file's `owner` makes safe: schedules of other owners are not looked at.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field

from components.config import RunConfig, load_run_config
from pipelines.cluster.submission import prepare, require_fit
from pipelines.placement import object_name
from tuneloop.config import StrictModel, parse_config, read_config_file
from tuneloop.errors import UserError

CREATE, REPLACE, PAUSE, RESUME, DELETE, KEEP = "create", "replace", "pause", "resume", "delete", "keep"


class ScheduleFile(StrictModel):
    """Whose schedules these are, and the configs of what is run."""

    owner: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")]
    configs: tuple[str, ...]  # paths, from the file's own folder


@dataclass(frozen=True)
class Declared:
    """A schedule that a cluster shall have.

    Attributes:
        name: of the schedule on the cluster.
        cron: five fields.
        runs_uri: every tick makes a run folder of its own below it.
    """

    name: str
    owner: str
    config: RunConfig
    cron: tuple[str, ...]
    timezone: str
    runs_uri: str
    paused: bool


@dataclass(frozen=True)
class Existing:
    """A schedule that a cluster has.

    Attributes:
        id: what the backend calls it.
        digest: of what it was made from.
        paused: no tick begins until it is resumed.
    """

    id: str
    name: str
    digest: str
    paused: bool
    cron: tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """One thing to do."""

    action: str
    name: str
    declared: Declared | None = None
    existing: tuple[Existing, ...] = ()


class Schedules(Protocol):
    """The schedules of one owner on one backend."""

    def digest(self, declared: Declared) -> str:
        """Of everything that the backend is told about a schedule but whether it is paused."""
        ...

    def existing(self, owner: str) -> list[Existing]:
        """What the backend has of an owner."""
        ...

    def create(self, declared: Declared) -> None:
        """Make it."""
        ...

    def replace(self, existing: Sequence[Existing], declared: Declared) -> None:
        """Put it in place of others of its name; one of them is there until it is."""
        ...

    def pause(self, existing: Existing, paused: bool) -> None:
        """Begin no tick until it is resumed, or resume it."""
        ...

    def delete(self, existing: Existing) -> None:
        """Remove it; runs that it has started go on."""
        ...


def read_schedules(path: Path, namespace: str = "") -> tuple[str, list[Declared]]:
    """The owner of a file's schedules, and the schedules; refused is what a tick would be refused for.

    Args:
        namespace: in place of the configs' own.

    Raises:
        UserError: the file or a config is refused, a config has no `[cluster.schedule]`, or two make the same schedule.
    """
    file = parse_config(ScheduleFile, read_config_file(path), origin=str(path))
    declared = [_declared(path.parent / name, file.owner, namespace) for name in file.configs]
    for one in declared:
        if sum(other.name == one.name for other in declared) > 1:
            raise UserError(f"{path}: two configs are called {one.config.name}, which names the schedule; rename one")
    return file.owner, declared


def read_owner(path: Path) -> str:
    """Whose schedules a file declares.

    Raises:
        UserError: the file is refused.
    """
    return parse_config(ScheduleFile, read_config_file(path), origin=str(path)).owner


def read_namespace(path: Path) -> str:
    """The one namespace that a file's configs name; empty for a file of none.

    Raises:
        UserError: the file or a config is refused, or they name several.
    """
    file = parse_config(ScheduleFile, read_config_file(path), origin=str(path))
    found = sorted({load_run_config(path.parent / name).cluster.namespace for name in file.configs})
    if len(found) > 1:
        raise UserError(f"{path}: its configs are of the namespaces {', '.join(found)}; make a file for each")
    return "".join(found)


def _declared(path: Path, owner: str, namespace: str) -> Declared:
    config = load_run_config(path, (f"cluster.namespace={namespace}",) if namespace else ())
    schedule = config.cluster.schedule
    if schedule is None:
        raise UserError(f"{path}: has no [cluster.schedule]; say when it runs, or take it from the list")
    prepare(config, schedule.runs_uri)
    require_fit(config)
    runs_uri = schedule.runs_uri.rstrip("/")
    # Whether it is paused is no part of what it is.
    plain = config.cluster.model_copy(update={"schedule": schedule.model_copy(update={"suspend": True})})
    config = config.model_copy(update={"cluster": plain})
    return Declared(
        object_name(config), owner, config, schedule.schedules, schedule.timezone, runs_uri, schedule.suspend
    )


def compare(backend: Schedules, owner: str, declared: Sequence[Declared]) -> list[Change]:
    """What has to be done, by name; nothing is done.

    Raises:
        UserError: the backend cannot run one as it is declared; it was not asked for anything.
    """
    digests = [backend.digest(one) for one in declared]
    existing: dict[str, list[Existing]] = {}
    for found in backend.existing(owner):
        existing.setdefault(found.name, []).append(found)
    changes = [
        _change(one, digest, tuple(existing.pop(one.name, ()))) for one, digest in zip(declared, digests, strict=True)
    ]
    return [*changes, *(Change(DELETE, name, existing=tuple(found)) for name, found in sorted(existing.items()))]


def _change(declared: Declared, digest: str, existing: tuple[Existing, ...]) -> Change:
    if not existing:
        return Change(CREATE, declared.name, declared)
    [first, *more] = existing
    if more or first.digest != digest:
        return Change(REPLACE, declared.name, declared, existing)
    if first.paused != declared.paused:
        return Change(PAUSE if declared.paused else RESUME, declared.name, declared, existing)
    return Change(KEEP, declared.name, declared, existing)


def apply(backend: Schedules, changes: Sequence[Change]) -> None:
    """Do what `compare` found."""
    for change in changes:
        if change.action == CREATE:
            assert change.declared
            backend.create(change.declared)
        elif change.action == REPLACE:
            assert change.declared
            backend.replace(change.existing, change.declared)
        elif change.action in (PAUSE, RESUME):
            backend.pause(change.existing[0], change.action == PAUSE)
        elif change.action == DELETE:
            for existing in change.existing:
                backend.delete(existing)
        print(f"{change.action:<8} {change.name}", flush=True)


def named(backend: Schedules, owner: str, name: str) -> list[Existing]:
    """The schedule of that name.

    Raises:
        UserError: the owner has none.
    """
    existing = backend.existing(owner)
    found = [one for one in existing if one.name == name]
    if not found:
        known = ", ".join(sorted({one.name for one in existing})) or "none"
        raise UserError(f"{name}: no such schedule of {owner}; there are: {known}")
    return found


def digest_of(content: object) -> str:
    """16 hex digits of sha256 over content as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
