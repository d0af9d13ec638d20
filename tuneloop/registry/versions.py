"""A registered version: its record, and its adapter with every file verified."""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuneloop.registry.layout import parse_object, version_key
from tuneloop.storage import Damaged, NotFound, Storage, files_below


@dataclass(frozen=True)
class RegisteredVersion:
    """One immutable version of an adapter; `record` is the content of its version.json."""

    adapter_name: str
    version: int
    record: Mapping[str, Any]
    storage: Storage

    def fetch_adapter(self, to: Path) -> Path:
        """Fetch the adapter into the folder `to`, which appears whole and verified; returns `to`.

        A folder that already holds exactly this adapter is kept.

        Raises:
            UserError: a file is missing or differs from its checksum, or `to` holds something else.
        """
        files = {name.removeprefix("adapter/"): digest for name, digest in self.record["files"].items()}
        if to.is_dir() and file_digests(to) == files:
            return to
        try:
            fetched = self.storage.get_tree(f"{version_key(self.adapter_name, self.version)}/adapter", to)
        except NotFound:
            fetched = {}
        for name, digest in files.items():
            if fetched.get(name) != digest:
                shutil.rmtree(to, ignore_errors=True)
                raise self._damaged(name, missing=name not in fetched)
        return to

    def verify(self) -> None:
        """Read every file and compare it with the record.

        Raises:
            UserError: a file is missing or differs from its checksum.
        """
        for name, expected in sorted(self.record["files"].items()):
            try:
                with self.storage.open_read(f"{version_key(self.adapter_name, self.version)}/{name}") as file:
                    actual = hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]
            except NotFound:
                raise self._damaged(name, missing=True) from None
            if actual != expected:
                raise self._damaged(name, missing=False)

    def _damaged(self, name: str, missing: bool) -> Damaged:
        what = "is missing" if missing else "differs from the checksum in version.json"
        return Damaged(f"{self.adapter_name} version {self.version}: {name} {what}; restore it or use another version")


@dataclass(frozen=True)
class ListedVersion:
    """A row of a listing; `record` is empty and `problem` says why when version.json cannot be used."""

    adapter_name: str
    version: int
    aliases: tuple[str, ...]
    record: Mapping[str, Any]
    problem: str = ""


def read_record(storage: Storage, adapter_name: str, version: int) -> dict[str, Any]:
    """The content of a version.json.

    Raises:
        NotFound: there is no such version.
        Damaged: it is not the record of this version.
    """
    key = f"{version_key(adapter_name, version)}/version.json"
    record = parse_object(storage.read_bytes(key), f"{storage.uri}/{key}")
    files = record.get("files")
    whole = isinstance(files, dict) and files and all(name.startswith("adapter/") for name in files)
    if record.get("version") != version or not whole or not isinstance(record.get("adapter_digest"), str):
        raise Damaged(f"{storage.uri}/{key}: is not the record of version {version}; restore it from a copy")
    return record


def file_digests(folder: Path) -> dict[str, str]:
    """relative path -> sha256 (hex) of every file below a folder.

    Raises:
        UserError: there is no such folder.
    """
    digests = {}
    for name in files_below(folder):
        with open(folder / name, "rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
