"""The part of a training loop that must survive a kill: counters, optimiser, and how far its logs had come."""

import json
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from tuneloop.checkpoint import CheckpointStore
from tuneloop.metrics import JsonLines, MetricsWriter


class Trained(Protocol):
    """What a checkpoint holds: everything that training changes, as named tensors."""

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors from which `load_state` continues to the last bit."""
        ...

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state()`."""
        ...

    def release(self) -> None:
        """Leave the parameters to somebody else."""
        ...


class RunState:
    """Continues from the newest committed checkpoint of a folder, or starts at update 0.

    Everything else that a loop needs is a function of the config and of `update`. Logs are cut back to where they were
    when the checkpoint was made, so a resumed run writes the same rows once.

    Attributes:
        update: updates done.
        metrics, samples: the loop's logs.
    """

    def __init__(self, folder: Path, trained: Trained, keep: int):
        self.trained = trained
        self._store = CheckpointStore(folder / "checkpoints", keep)
        checkpoint = self._store.latest()
        saved = {"seconds": 0.0, "metrics": 0, "samples": 0}
        self.update = 0
        if checkpoint:
            self.update = checkpoint.update
            saved = json.loads((checkpoint.path / "state.json").read_text())
            trained.load_state(load_file(checkpoint.path / "optimizer.safetensors"))
            print(f"continuing from the checkpoint of update {self.update}", flush=True)
        self.metrics = MetricsWriter(
            folder,
            offset=saved["metrics"],
            first_update=self.update + 1 if checkpoint else 0,
            seconds=saved["seconds"],
        )
        self.samples = JsonLines(folder / "samples.jsonl", saved["samples"])

    def save(self) -> None:
        """Commit a checkpoint of the current update; the logs up to it are safe from a kill."""
        self.metrics.flush()

        def write(folder: Path) -> None:
            save_file(
                {name: t.contiguous() for name, t in self.trained.state().items()}, folder / "optimizer.safetensors"
            )
            state = {
                "seconds": self.metrics.seconds(),
                "metrics": self.metrics.offset(),
                "samples": self.samples.offset(),
            }
            (folder / "state.json").write_text(json.dumps(state))

        self._store.save(self.update, write)

    def close(self) -> None:
        """Flush and close the logs, and let go of the parameters."""
        self.trained.release()
        self.metrics.close()
        self.samples.close()
