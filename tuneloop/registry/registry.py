"""The registry's own operations: list, show, resolve, register, promote, roll back."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from tuneloop.errors import UserError
from tuneloop.registry import registration
from tuneloop.registry.aliases import PRODUCTION, Alias, move_alias, moved_meanwhile, read_alias
from tuneloop.registry.layout import check_name, version_number
from tuneloop.registry.versions import ListedVersion, RegisteredVersion, read_record
from tuneloop.storage import NotFound, open_storage


class Registry:
    """The adapters at a URI: a local folder or `s3://bucket/prefix`.

    Raises:
        UserError: the URI names a file or an unknown kind of storage.
    """

    def __init__(self, uri: str):
        self.uri, self.storage = uri, open_storage(uri)

    def register(self, adapter_name: str, adapter_folder: Path, record: Mapping[str, Any]) -> RegisteredVersion:
        """Store an adapter as a new immutable version, or find the version that already holds this adapter.

        Args:
            adapter_folder: the folder whose files become `adapter/…`.
            record: what version.json shall say; must hold "adapter_digest". The version, the name, the time and the
                files' sha256 are added.

        Raises:
            UserError: not a name, or the folder is missing, empty, or changes while it is stored.
        """
        number = registration.register(self.storage, adapter_name, adapter_folder, record)
        return self.show(adapter_name, number)

    def show(self, adapter_name: str, version: int) -> RegisteredVersion:
        """One version.

        Raises:
            UserError: there is no such version, or its version.json is damaged.
        """
        check_name(adapter_name, "adapter")
        try:
            record = read_record(self.storage, adapter_name, version)
        except NotFound:
            known = ", ".join(map(str, self.versions(adapter_name)))
            raise UserError(f"{self.uri}: {adapter_name} has no version {version}; it has: {known}") from None
        return RegisteredVersion(adapter_name, version, record, self.storage)

    def resolve(self, adapter_name: str, alias: str = PRODUCTION) -> RegisteredVersion | None:
        """The version that an alias names; None when the alias does not exist yet.

        Raises:
            UserError: the alias file is damaged, or the version that it names is missing or damaged.
        """
        current, _ = read_alias(self.storage, adapter_name, alias)
        return self.show(adapter_name, current.version) if current else None

    def alias(self, adapter_name: str, alias: str = PRODUCTION) -> Alias:
        """Where an alias points.

        Raises:
            UserError: there is no such adapter or alias, or the alias file is damaged.
        """
        current, _ = read_alias(self.storage, adapter_name, alias)
        if current is None:
            self.versions(adapter_name)  # an unknown adapter is the likelier mistake
            known = ", ".join(self.aliases(adapter_name)) or "none yet"
            raise UserError(f"{self.uri}: {adapter_name} has no alias {alias!r}; it has: {known}")
        return current

    def expect(self, adapter_name: str, alias: str, expected: int | None) -> None:
        """See that an alias names what the caller expects (None: that it does not exist yet).

        Raises:
            AliasMoved: it names something else; the message says who moved it.
        """
        _check_expected(adapter_name, alias, read_alias(self.storage, adapter_name, alias)[0], expected)

    def promote(self, adapter_name: str, version: int, alias: str, expected: int | None) -> Alias:
        """Move an alias to a version that is whole, if it still names what the caller expects.

        Args:
            expected: the version that the alias names now; None: it does not exist yet. An alias that already names
                `version` is left as it is, so that a retry succeeds.

        Raises:
            AliasMoved: the alias names something else; the message says who moved it.
            UserError: there is no such version, or it is damaged.
        """
        self.show(adapter_name, version).verify()
        current, tag = read_alias(self.storage, adapter_name, alias)
        if current and current.version == version:
            return current
        _check_expected(adapter_name, alias, current, expected)
        return move_alias(self.storage, adapter_name, alias, version, expected, tag)

    def rollback(self, adapter_name: str, alias: str = PRODUCTION) -> Alias:
        """Move an alias back to the version before; repeated, it goes on to that version's parent.

        Raises:
            UserError: the alias does not exist, has nothing before it, or what was before it is damaged.
            AliasMoved: someone moved the alias at the same time.
        """
        self.alias(adapter_name, alias)
        current, tag = read_alias(self.storage, adapter_name, alias)
        if current is None or current.previous is None:
            raise UserError(f"{adapter_name} {alias}: nothing was there before, so there is nothing to go back to")
        target = self.show(adapter_name, current.previous)
        target.verify()
        return move_alias(self.storage, adapter_name, alias, target.version, target.record.get("parent"), tag)

    def names(self) -> list[str]:
        """The adapters that have a version, sorted."""
        return sorted({key.split("/")[0] for key in self.storage.list() if version_number(key, "version.json")})

    def versions(self, adapter_name: str) -> list[int]:
        """The numbers of an adapter's committed versions, ascending.

        Raises:
            UserError: the adapter has none.
        """
        check_name(adapter_name, "adapter")
        found = [version_number(key, "version.json") for key in self.storage.list(f"{adapter_name}/versions")]
        versions = sorted(number for number in found if number)
        if not versions:
            names = ", ".join(self.names()) or "none yet"
            raise UserError(f"{self.uri}: holds no adapter {adapter_name!r}; it holds: {names}")
        return versions

    def aliases(self, adapter_name: str) -> dict[str, Alias]:
        """The aliases of an adapter.

        Raises:
            UserError: an alias file is damaged.
        """
        check_name(adapter_name, "adapter")
        keys = [PurePosixPath(key) for key in self.storage.list(f"{adapter_name}/aliases") if key.endswith(".json")]
        found = {key.stem: read_alias(self.storage, adapter_name, key.stem)[0] for key in keys}
        return {name: alias for name, alias in found.items() if alias}

    def list(self, adapter_name: str = "") -> list[ListedVersion]:
        """Every version of one adapter, or of all, in order; a damaged one is listed with its problem.

        Raises:
            UserError: no such adapter, or an alias file is damaged.
        """
        rows = []
        for name in [adapter_name] if adapter_name else self.names():
            versions, aliases = self.versions(name), self.aliases(name)
            for version in versions:
                named = tuple(alias for alias, moved in aliases.items() if moved.version == version)
                try:
                    rows.append(ListedVersion(name, version, named, read_record(self.storage, name, version)))
                except UserError as error:
                    rows.append(ListedVersion(name, version, named, {}, str(error)))
        return rows


def _check_expected(adapter_name: str, alias: str, current: Alias | None, expected: int | None) -> None:
    if (current.version if current else None) != expected:
        wanted = ", expected " + (f"version {expected}" if expected else "no such alias yet")
        raise moved_meanwhile(adapter_name, alias, current, wanted)
