"""Aliases: small files that name a version and are moved by compare-and-swap."""

from dataclasses import asdict, dataclass

from tuneloop.errors import TryAgain, UserError
from tuneloop.registry.layout import alias_key, check_name, now, parse_object, to_json, who
from tuneloop.storage import ABSENT, Damaged, NotFound, Storage, VersionConflict

PRODUCTION = "production"


class AliasMoved(TryAgain):
    """The alias does not name what the caller expected; nothing was moved."""


@dataclass(frozen=True)
class Alias:
    """Where an alias points, where it pointed before, and who moved it when."""

    version: int
    previous: int | None
    moved_at: str
    moved_by: str


def read_alias(storage: Storage, adapter_name: str, alias: str) -> tuple[Alias | None, str | None]:
    """The alias and its version tag; (None, None) when it does not exist.

    Raises:
        UserError: not a name, or the file is damaged.
    """
    check_name(adapter_name, "adapter")
    check_name(alias, "alias")
    key = alias_key(adapter_name, alias)
    try:
        data, tag = storage.read_versioned(key)
    except NotFound:
        return None, None
    values = parse_object(data, f"{storage.uri}/{key}")
    version, previous = values.get("version"), values.get("previous")
    if not isinstance(version, int) or not isinstance(previous, int | None):
        raise Damaged(f"{storage.uri}/{key}: names no version; restore it, or delete it and promote again")
    return Alias(version, previous, str(values.get("moved_at", "")), str(values.get("moved_by", ""))), tag


def move_alias(
    storage: Storage, adapter_name: str, alias: str, version: int, previous: int | None, tag: str | None
) -> Alias:
    """Point an alias at `version` if it is still as it was read.

    Args:
        previous: where a rollback shall go.
        tag: the version tag that `read_alias` gave.

    Raises:
        AliasMoved: it was moved meanwhile.
        UserError: the storage ignores the condition of a write, so two runs could both move it.
    """
    _check_condition(storage, alias_key(adapter_name, alias), tag)
    moved = Alias(version, previous, now(), who())
    try:
        storage.write_bytes(alias_key(adapter_name, alias), to_json(asdict(moved)), if_version=tag or ABSENT)
    except VersionConflict:
        current, _ = read_alias(storage, adapter_name, alias)
        raise moved_meanwhile(adapter_name, alias, current) from None
    return moved


def _check_condition(storage: Storage, key: str, tag: str | None) -> None:
    """See that a write which expects another version fails; some S3 servers know If-None-Match only."""
    if tag is None:
        return
    try:
        storage.write_bytes(key, storage.read_bytes(key), if_version=f'"{"0" * 32}"')
    except (VersionConflict, NotFound):
        return
    raise UserError(f"{storage.uri}: the server ignores If-Match on PUT, so two runs could both move {key}; "
                    "use one that honours conditional writes")  # fmt: skip


def moved_meanwhile(adapter_name: str, alias: str, current: Alias | None, expected: str = "") -> AliasMoved:
    """The error that says where the alias points now, and who moved it there."""
    now_names = f"now names version {current.version}" if current else "does not exist any more"
    by = f" (moved by {current.moved_by} at {current.moved_at})" if current and current.moved_by else ""
    return AliasMoved(f"{adapter_name} {alias}: {now_names}{by}{expected}; nothing was moved")
