"""What the benchmarks share: the machine's name and floors, processes of their own, the table, the dated file.

A benchmark is `python benchmarks/<name>.py` or `python -m benchmarks.<name>`; it prints its table and saves
`results/<date>-<hardware>-<name>.json`, whose key "table" holds the rows that `python -m benchmarks` collects.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tuneloop.memory import TRAINING_ENVIRONMENT

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """A line of the table: two things measured in one run on the same work.

    Attributes:
        what: the work, and the unit of both figures.
        ours, against: the figures, and in `against` also of what.
        ratio: how they are compared is said by `what`; 1 means equal.
        floor: the ratio that nothing could beat, or that is asked for, and which of the two.
    """

    what: str
    ours: str
    against: str
    ratio: float | None
    floor: str


def hardware() -> str:
    """The machine in a few words that may stand in a file's name: `1x-nvidia-h100-80gb-hbm3`, `2-core-avx512`."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name().lower().replace(" ", "-").replace("/", "-")
        return f"{torch.cuda.device_count()}x-{name}"
    cores = len(os.sched_getaffinity(0))
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    best = next((name for name in ("avx512f", "avx2", "asimd") if f" {name}" in flags), "cpu")
    return f"{cores}-core-{best.removesuffix('f')}"


def save(name: str, rows: Sequence[Row], details: dict[str, Any]) -> Path:
    """Print the table and write the dated file; a run on the same day replaces it."""
    print(table(rows))
    machine = hardware()
    path = RESULTS / f"{date.today()}-{machine}-{name}.json"
    path.parent.mkdir(exist_ok=True)
    content = {
        "benchmark": name,
        "date": str(date.today()),
        "hardware": machine,
        "table": [asdict(row) for row in rows],
        **details,
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"saved {path.relative_to(REPOSITORY)}", flush=True)
    return path


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned columns."""
    lines = [("what", "ours", "against", "ratio", "floor")]
    lines += [(r.what, r.ours, r.against, "" if r.ratio is None else f"{r.ratio:.3g}", r.floor) for r in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(5)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def in_child(script: Path, *arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run `script --child ARGUMENTS` in a process of its own; returns the JSON that its last line holds."""
    command = [sys.executable, str(script), "--child", *arguments]
    variables = {**os.environ, **TRAINING_ENVIRONMENT, "PYTHONPATH": str(REPOSITORY), **(environment or {})}
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def status_bytes(key: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key} line")


class MemoryWindow:
    """How far this process's memory rises while entered: on a GPU the allocator's, on a CPU the resident set's.

    Attributes:
        before, rise: bytes; `rise` is the peak above `before`.
    """

    def __enter__(self) -> "MemoryWindow":
        import ctypes

        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed before would hide what is taken now
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets the peak back to the present
            self.before = status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else status_bytes("VmHWM")
        self.rise = max(0, peak - self.before)


def tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach, each storage once, gradients included."""
    import torch

    gc.collect()
    storages: dict[int, int] = {}
    for held in gc.get_objects():
        if issubclass(type(held), torch.Tensor):  # isinstance would wake lazy modules that stand for classes
            for tensor in (held, held.grad) if held.is_leaf else (held,):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def seconds_of(action: Callable[[], object], repeats: int = 3) -> float:
    """The least wall-clock of `repeats`: what the machine can do when nothing disturbs it."""
    import torch

    best = float("inf")
    for _ in range(repeats):
        synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
        synchronize()
        started = time.perf_counter()
        action()
        synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def matmul_rate(dtype: str = "bfloat16", size: int = 2048) -> float:
    """Floating-point operations a second of a square matrix product."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(size, size, device=device).to(getattr(torch, dtype))
    return 2 * size**3 / seconds_of(lambda: a @ a, 5)


def read_rate(size: int = 1 << 28) -> float:
    """Bytes a second that memory gives: a copy counts its reads and its writes."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), 5)
