"""Metrics of a training step: one JSON line an update, and TensorBoard beside it."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneloop.errors import UserError


class JsonLines:
    """An append-only file of JSON objects that can be cut back to a known length on resume."""

    def __init__(self, path: Path, offset: int | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        if offset is not None and size < offset:
            raise UserError(f"{path}: shorter than its checkpoint says; remove {path.parent} and run again")
        if offset is not None and size > offset:
            os.truncate(path, offset)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  held open between rows

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object and hand it to the kernel."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def position(self) -> int:
        """Bytes so far."""
        return os.fstat(self._file.fileno()).st_size

    def sync(self) -> None:
        """Bring all of it to the disk: a checkpoint counts on it."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class MetricsWriter:
    """Writes `metrics.jsonl` and `tensorboard/` in a folder.

    Args:
        folder: where they go.
        offset: cut `metrics.jsonl` to this many bytes first (what a checkpoint recorded).
        first_update: TensorBoard forgets what it has from this update on.
        seconds: time already spent, so that `time` goes on after a resume.
    """

    def __init__(self, folder: Path, *, offset: int = 0, first_update: int = 0, seconds: float = 0.0):
        from torch.utils.tensorboard.writer import SummaryWriter  # imports torch

        self._path = folder / "metrics.jsonl"
        self._lines = JsonLines(self._path, offset)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_update)
        self._started = time.monotonic() - seconds

    def write(self, update: int, values: Mapping[str, float]) -> None:
        """Record the metrics of one update."""
        row = {"update": update, "time": round(self.seconds(), 3)}
        # JSON has no NaN: a metric that is not finite is left out.
        self._lines.write(row | {name: _rounded(value) for name, value in values.items() if math.isfinite(value)})
        for name, value in values.items():
            self._board.add_scalar(name, value, update)

    def column(self, name: str) -> list[float]:
        """All values of one metric so far, earlier attempts included."""
        rows = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return [row[name] for row in rows if name in row]

    def seconds(self) -> float:
        """Seconds of training so far, earlier attempts included."""
        return time.monotonic() - self._started

    def position(self) -> int:
        """Bytes of `metrics.jsonl` so far."""
        return self._lines.position()

    def sync(self) -> None:
        """Bring `metrics.jsonl` to the disk."""
        self._lines.sync()

    def flush(self) -> None:
        """Wait until every event is written: TensorBoard's writer works in a thread of its own."""
        self._board.flush()

    def close(self) -> None:
        """Flush and close both."""
        self._lines.close()
        self._board.close()


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
