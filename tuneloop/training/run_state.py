"""The part of a training loop that must survive a kill: counters, optimiser, and how far its logs had come."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file

from tuneloop.checkpoint import CheckpointStore
from tuneloop.metrics import JsonLines, MetricsWriter
from tuneloop.world import World

Tensors = dict[str, torch.Tensor]


class Trained(Protocol):
    """What a checkpoint holds: everything that training changes, as named tensors."""

    def state(self) -> Tensors:
        """Tensors from which `load_state` continues to the last bit."""
        ...

    def load_state(self, state: Tensors) -> None:
        """Continue from `state()`."""
        ...

    def release(self) -> None:
        """Leave the parameters to somebody else."""
        ...


@dataclass(frozen=True)
class _Boundary:
    """A place between two updates: how many are done, for how long, and the bytes of the logs so far."""

    update: int = 0
    seconds: float = 0.0
    metrics: int = 0
    samples: int = 0


class RunState:
    """Continues from the newest committed checkpoint of a folder, or starts at update 0.

    Everything else that a loop needs is a function of the config and of `update`. Logs are cut back to where they were
    when the checkpoint was made, so a resumed run writes the same rows once.

    Args:
        folder: the loop's output; checkpoints are under it.
        trained: what is trained.
        keep: how many checkpoints stay.
        copies: hold a copy (in host memory) of the state before an update while that update changes it, so that the
            update can be abandoned at any time. Without one, an update that has begun to change the state and is
            abandoned goes back to the newest checkpoint.
        world: the processes that train; the first one reads and writes, the others' logs are thrown away.

    Attributes:
        update: updates done.
        metrics, samples: the loop's logs.
        saved: the update of the newest checkpoint, from which a resumed run goes on; 0 when there is none.
    """

    def __init__(self, folder: Path, trained: Trained, keep: int, *, copies: bool = True, world: World | None = None):
        self.trained, self._copies = trained, copies
        world = world or World()
        self._writes = world.is_first
        self._store = CheckpointStore(folder / "checkpoints", keep)
        self._copy: Tensors | None = None
        self._changing = False  # whether the running update has begun to change the state
        self._boundary = _Boundary()
        found = self._read(world)
        self._has_checkpoint = found is not None
        if found:
            self._boundary, state = found
            trained.load_state(state)
            print(f"continuing from the checkpoint of update {self.update}", flush=True)
        self.saved = self.update
        self._scratch = None if self._writes else tempfile.TemporaryDirectory()
        logs = Path(self._scratch.name) if self._scratch else folder
        self.metrics = MetricsWriter(
            logs,
            offset=self._boundary.metrics if self._writes else 0,
            first_update=self.update + 1 if found else 0,
            seconds=self._boundary.seconds,
        )
        self.samples = JsonLines(logs / "samples.jsonl", self._boundary.samples if self._writes else 0)

    def _read(self, world: World) -> tuple[_Boundary, Tensors] | None:
        """What the first process finds in its folder, in every process: those of other machines have none."""
        boundary, state = None, {}
        checkpoint = self._store.latest() if world.is_first else None
        if checkpoint:
            boundary = _Boundary(checkpoint.update, **json.loads((checkpoint.path / "state.json").read_text()))
            state = load_file(checkpoint.path / "optimizer.safetensors")
        boundary = world.from_first(boundary)
        return None if boundary is None else (boundary, world.tensors_from_first(state))

    @property
    def update(self) -> int:
        """Updates done."""
        return self._boundary.update

    @property
    def is_new(self) -> bool:
        """Whether nothing is recorded yet: not even the row of update 0, the validation before any training."""
        return self._boundary == _Boundary()

    def changes(self) -> None:
        """To be called before anything changes the trained state; the first call of an update may copy it."""
        if not self._changing and self._copies:
            self._copy = {name: tensor.to("cpu", copy=True) for name, tensor in self.trained.state().items()}
        self._changing = True

    def record(self, update: int, values: Mapping[str, float]) -> None:
        """Write the row of a finished update; what there is now is what an abandoned update goes back to."""
        self.metrics.write(update, values)
        offsets = self.metrics.position(), self.samples.position()
        self._boundary = _Boundary(update, self.metrics.seconds(), *offsets)
        self._copy, self._changing = None, False

    def save(self) -> None:
        """Commit a checkpoint of the last finished update; the logs up to it are safe from a kill."""
        assert not self._changing, "the running update has changed the state: save_abandoned"
        self._save(self.trained.state())

    def save_abandoned(self) -> int:
        """Save what there was before the running update, which is given up.

        Returns:
            `saved`, as it is then.
        """
        state = self._copy if self._changing else self.trained.state()
        is_saved = self._has_checkpoint and self.saved == self.update
        if state is not None and not is_saved and not self.is_new:
            self._save(state)
        return self.saved

    def _save(self, state: Tensors) -> None:
        if not self._writes:
            self._has_checkpoint, self.saved = True, self.update
            return
        self.metrics.flush()
        for log in (self.metrics, self.samples):
            log.sync()

        def write(folder: Path) -> None:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "optimizer.safetensors")
            boundary = asdict(self._boundary)
            del boundary["update"]  # the checkpoint's own marker names it
            (folder / "state.json").write_text(json.dumps(boundary))

        self._store.save(self.update, write)
        self._has_checkpoint, self.saved = True, self.update

    def close(self) -> None:
        """Flush and close the logs, and let go of the parameters."""
        self.trained.release()
        self.metrics.close()
        self.samples.close()
