"""Keeps a vLLM server on the version that an alias of the registry names.

What is wanted (the alias) is compared with what is there (the server's own list) at every look, so it does not matter
which of follower, server and registry was started again. Every version has a folder of its own: vLLM tells cached
prefixes of different adapters apart by name and folder.
"""

import hashlib
import json
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from tuneloop.errors import TuneloopError, UserError
from tuneloop.registry import RegisteredVersion, Registry
from tuneloop.registry.versions import file_digests
from tuneloop.serving.vllm_server import AdapterRefused, ServerDown, VllmServer

REFUSED_AGAIN_SECONDS = 300.0  # until a version that vLLM refused is tried again
LAST = "last.json"  # beside the versions: which of them was served last


@dataclass(frozen=True)
class Status:
    """What one look found: the version that is wanted and the one that is served, None when there is none.

    `problem` is one line, empty when all is well; `waiting` says that vLLM itself does not answer yet.
    """

    wanted: int | None = None
    served: int | None = None
    problem: str = ""
    waiting: bool = False


class AliasFollower:
    """Serves `adapter_name` under its own name at whatever version the alias names.

    Args:
        folder: where versions are kept; the server reads the same path.
        base_uri: the base model that is served; a version that was trained on another is refused. Empty: not compared.
    """

    def __init__(
        self, registry: Registry, adapter_name: str, alias: str, server: VllmServer, folder: Path, base_uri: str = ""
    ):
        self._registry, self.adapter_name, self._alias, self._server = registry, adapter_name, alias, server
        self._folder, self._base_uri = folder / adapter_name, base_uri
        self._refused: dict[Path, tuple[float, str]] = {}

    def look(self) -> Status:
        """Bring the server to the version that the alias names, if it is not there yet.

        Nothing that can go wrong takes away what is served: the version before stays, and `problem` says why.
        """
        status = Status()
        try:
            served = self._server.adapters().get(self.adapter_name)
            status = Status(served=_version_in(served))
            version = self._registry.resolve(self.adapter_name, self._alias)
            if version is None:
                raise UserError(
                    f"{self._registry.uri}: {self.adapter_name} has no alias {self._alias!r} yet; promote a version"
                )
            status = replace(status, wanted=version.version)
            target = self._target(version)
            if served != str(target):
                self._refuse(version, target, served)
                version.fetch_adapter(_undamaged(target, _files(version)))
                self._switch(target)
            self._remember(version, target, served)
            return replace(status, served=version.version)
        except ServerDown as error:
            return replace(status, served=None, problem=str(error), waiting=True)
        except (TuneloopError, OSError) as error:
            return self._hold(replace(status, problem=" ".join(str(error).split())))

    def is_served(self) -> bool:
        """Whether the server answers for the adapter at this moment."""
        try:
            return self.adapter_name in self._server.adapters()
        except TuneloopError:
            return False

    def _target(self, version: RegisteredVersion) -> Path:
        digest = hashlib.sha256(version.record["adapter_digest"].encode()).hexdigest()
        return self._folder / f"{version.version}-{digest[:12]}"

    def _refuse(self, version: RegisteredVersion, target: Path, served: str | None) -> None:
        """Raise what is known to be wrong with a version."""
        trained_on = version.record.get("base_uri")
        if self._base_uri and trained_on != self._base_uri:
            raise UserError(f"{self.adapter_name} version {version.version} was trained on {trained_on}, "
                            f"but {self._base_uri} is served; serve that base, or move the alias back")  # fmt: skip
        again, message = self._refused.get(target, (0.0, ""))
        if served and time.monotonic() < again:  # a server with nothing to lose is asked each time: it may be another
            raise AdapterRefused(message)

    def _switch(self, target: Path) -> None:
        """Let the adapter's name mean the folder `target`; vLLM tries it before it gives up what it has."""
        try:
            self._server.load(self.adapter_name, target)
        except AdapterRefused as error:
            self._refused[target] = (time.monotonic() + REFUSED_AGAIN_SECONDS, str(error))
            raise

    def _hold(self, status: Status) -> Status:
        """Serve what was served last, which a server that was started again has forgotten."""
        try:
            served = self._server.adapters().get(self.adapter_name)
            if served is None and (last := self._last()):
                self._server.load(self.adapter_name, last)
                served = str(last)
        except TuneloopError as error:
            return replace(status, served=None, problem=f"{status.problem}; {error}")
        return replace(status, served=_version_in(served))

    def _last(self) -> Path | None:
        """The folder that was served last; None if there is none, or it is damaged or for another base."""
        try:
            known = json.loads((self._folder / LAST).read_text())
            folder = self._folder / known["folder"]
            return folder if known["base_uri"] == self._base_uri and file_digests(folder) == known["files"] else None
        except (OSError, ValueError, UserError):
            return None

    def _remember(self, version: RegisteredVersion, target: Path, before: str | None) -> None:
        """Note what is served, and remove all versions but it and the one before, which requests may still need."""
        note = json.dumps({"folder": target.name, "base_uri": self._base_uri, "files": _files(version)})
        place = self._folder / LAST
        if place.is_file() and place.read_text() == note:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f".{LAST}"
        partial.write_text(note)
        os.replace(partial, place)
        for path in self._folder.iterdir():
            if path.is_dir() and path != target and str(path) != before:
                shutil.rmtree(path, ignore_errors=True)


def _files(version: RegisteredVersion) -> dict[str, str]:
    """Name -> sha256 of the files of a version's adapter."""
    return {name.removeprefix("adapter/"): digest for name, digest in version.record["files"].items()}


def _undamaged(folder: Path, files: dict[str, str]) -> Path:
    """A folder that is either absent or holds just these files."""
    if folder.is_dir() and file_digests(folder) != files:
        shutil.rmtree(folder)
    return folder


def _version_in(folder: str | None) -> int | None:
    number = Path(folder or "").name.partition("-")[0]
    return int(number) if number.isdigit() else None
