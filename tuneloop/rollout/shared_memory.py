"""Files in memory: a folder of this process's own, and a copy of the base model that outlives it.

The private folder carries a lock that its owner holds. One whose lock is free was left by a killed process; it is
removed by the next one that makes a folder here.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tuneloop.errors import UserError
from tuneloop.files import sha256_of

SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "tuneloop-engine-"
_LOCK = "lock"
_MODELS = "tuneloop-models"


class PrivateFolder:
    """A folder that is removed by `close`, or by the next process when this one was killed.

    Attributes:
        path: where it is.
    """

    def __init__(self, root: Path = SHARED_MEMORY):
        if not root.is_dir():
            raise UserError(f"{root} is no folder: the vllm engine hands adapters over in memory; mount a tmpfs there "
                            'or use engine.kind = "torch"')  # fmt: skip
        with _locked(root / f"{_PREFIX}{_LOCK}"):  # a folder without its lock would be taken for an abandoned one
            _remove_abandoned(root)
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
            self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove it; twice is as good as once."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _remove_abandoned(root: Path) -> None:
    for lock in root.glob(f"{_PREFIX}*/{_LOCK}"):
        try:
            descriptor = os.open(lock, os.O_RDWR)
        except OSError:  # another user's, or removed meanwhile
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
        except BlockingIOError:
            pass  # its owner lives
        finally:
            os.close(descriptor)


def model_in_memory(folder: Path, root: Path = SHARED_MEMORY) -> Path:
    """A copy of a model's files in memory, made once for each content and kept for the next run.

    A folder whose files have the sizes and times that they had before is not read again.

    Raises:
        UserError: the memory does not hold it.
    """
    models = root / _MODELS
    models.mkdir(exist_ok=True)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    known_as = models / f"{_digest_of_status(files)}.seen"
    with _locked(models / _LOCK):
        if known_as.is_file() and (models / known_as.read_text()).is_dir():
            return models / known_as.read_text()
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(sha256_of, files))
        parts = (f"{path.name} {digest}" for path, digest in zip(files, digests, strict=True))
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
        if not (models / key).is_dir():
            _copy(folder, files, models / key)
        known_as.write_text(key)
    return models / key


def _digest_of_status(files: list[Path]) -> str:
    status = ((str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return hashlib.sha256(repr(list(status)).encode()).hexdigest()[:32]


def _copy(folder: Path, files: list[Path], target: Path) -> None:
    needed, free = sum(path.stat().st_size for path in files), shutil.disk_usage(target.parent).free
    if needed > free:
        raise UserError(f"lora_rl.engine.use_shm: {folder} is {needed:,} bytes and {target.parent} has {free:,} free: "
                        "give the pod a larger memory volume, remove old models, or leave use_shm out")  # fmt: skip
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed while it copied
    partial.mkdir()
    for path in files:
        shutil.copyfile(path, partial / path.name)
    partial.rename(target)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
