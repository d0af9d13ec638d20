"""Checkpoints: a directory committed by one atomic marker, so that a kill at any instant leaves the old or the new one.

```text
<folder>/update-000120/            the one before
<folder>/update-000130/            what `write` made, and
<folder>/update-000130/COMMITTED   {"update": 130, "files": {"<path>": {"sha256", "bytes"}}}, written last
<folder>/update-000140.tmp-…/      a save that is under way, or was killed
<folder>/update-000130.replaced/   only while update 130 is saved a second time
```
"""

import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tuneloop.files import fsync, sha256_of

MARKER = "COMMITTED"
_NAME = re.compile(r"update-(\d{6,})(\.replaced)?")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: the update it was saved after, and the folder that holds it."""

    update: int
    path: Path


class CheckpointStore:
    """The checkpoints of one run, in one folder on a local file system. One process writes; any may read.

    Args:
        folder: where the checkpoints are; made by the first save.
        keep: how many of the newest stay; older ones are removed after a save.
    """

    def __init__(self, folder: Path, keep: int):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep = folder, keep

    def save(self, update: int, write: Callable[[Path], None]) -> Checkpoint:
        """Make the checkpoint of `update`; when this returns it is on the disk, and is what `latest` finds.

        A checkpoint of the same update is replaced, and those of later updates are removed: they belong to a course
        that the run has left.

        Args:
            update: the number of optimiser updates done, from 0.
            write: fills the empty folder that it is given.

        Raises:
            OSError: the disk is full or refuses; the checkpoints made before are untouched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"update-{update:06d}"
        temporary = _temporary_name(target)
        temporary.mkdir()
        try:
            write(temporary)
            _commit(temporary, update)
            replaced = target.with_name(f"{target.name}.replaced")
            if target.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                os.rename(target, replaced)
            os.rename(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        fsync(self.folder)
        self._prune(update)
        return Checkpoint(update, target)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint whose files all have the sizes and sha256 that its marker names.

        A damaged one is reported in a line on stderr, and the one before it is taken.
        """
        for checkpoint in self._committed():
            problem = _problem(checkpoint)
            if problem is None:
                return checkpoint
            print(f"warning: {checkpoint.path}: damaged ({problem}); going back to an earlier checkpoint",
                  file=sys.stderr, flush=True)  # fmt: skip
        return None

    def _committed(self) -> Iterator[Checkpoint]:
        """Newest first; a replaced one comes after the one that replaced it."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        found = [match for match in map(_NAME.fullmatch, names) if match]
        for match in sorted(found, key=lambda match: (int(match[1]), match[2] is None), reverse=True):
            yield Checkpoint(int(match[1]), self.folder / match[0])

    def _prune(self, update: int) -> None:
        current = self.folder / f"update-{update:06d}"
        older = [checkpoint for checkpoint in self._committed() if checkpoint.update < update]
        kept = {current, *(checkpoint.path for checkpoint in older[: self.keep - 1])}
        for checkpoint in list(self._committed()):
            if checkpoint.path not in kept:
                # Renamed first, so that a kill half-way through the removal leaves no damaged checkpoint behind.
                os.rename(checkpoint.path, _temporary_name(checkpoint.path))
        for stale in self.folder.glob("update-*.tmp-*"):
            shutil.rmtree(stale, ignore_errors=True)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")


def _commit(folder: Path, update: int) -> None:
    """Bring every file to the disk, then the marker that vouches for them, then the folder's own entries."""
    files = {}
    for path in sorted(folder.rglob("*")):
        fsync(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    marker = folder / MARKER
    marker.write_text(json.dumps({"update": update, "files": files}, indent=1) + "\n")
    fsync(marker)
    fsync(folder)


def _problem(checkpoint: Checkpoint) -> str | None:
    """What is wrong with a checkpoint, in a few words; None when all of it is as it was written."""
    try:
        marker = json.loads((checkpoint.path / MARKER).read_bytes())
        if marker["update"] != checkpoint.update:
            return f"its marker names update {marker['update']}"
        for name, expected in marker["files"].items():
            path = checkpoint.path / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if sha256_of(path) != expected["sha256"]:
                return f"{name} differs from its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MARKER} is unreadable"
    return None
