"""What the planned-for hardware can do: GPU kinds by their makers' data sheets, and the CPU of this machine, measured.

Memory is what the driver reports as total (nvidia-smi), which is a little less than the name says where ECC takes a
share. Arithmetic is dense bf16 with fp32 accumulation. Links are one direction, between two GPUs of one machine.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from tuneloop.errors import UserError

MIB = 1 << 20


@dataclass(frozen=True)
class Device:
    """One accelerator, or the CPU of a machine.

    Attributes:
        memory_bytes: of one of them.
        flops: bf16 floating point operations a second.
        bandwidth: of its memory, bytes a second.
        link: to another one of the same machine, bytes a second.
        host_link: to the host's memory, bytes a second.
    """

    kind: str
    memory_bytes: int
    flops: float
    bandwidth: float
    link: float
    host_link: float

    @property
    def is_cpu(self) -> bool:
        """Whether it computes in the host's own memory."""
        return self.kind == "cpu"


def _gpu(kind: str, mib: int, teraflops: float, gigabytes: float, link: float, host: float) -> Device:
    return Device(kind, mib * MIB, teraflops * 1e12, gigabytes * 1e9, link * 1e9, host * 1e9)


# kind, MiB, bf16 TFLOP/s, memory GB/s, GB/s to a neighbour (NVLink, else PCIe), GB/s to the host (PCIe)
GPUS = {
    gpu.kind: gpu
    for gpu in (
        _gpu("l4-24gb", 23_034, 121, 300, 25, 25),
        _gpu("a10g-24gb", 23_028, 70, 600, 25, 25),
        _gpu("rtx3090-24gb", 24_576, 71, 936, 25, 25),
        _gpu("rtx4090-24gb", 24_564, 165, 1_008, 25, 25),
        _gpu("a100-40gb", 40_960, 312, 1_555, 300, 25),
        _gpu("l40s-48gb", 46_068, 362, 864, 25, 25),
        _gpu("a100-80gb", 81_920, 312, 2_039, 300, 25),
        _gpu("h100-80gb", 81_559, 989, 3_352, 450, 55),
        _gpu("h200-141gb", 143_771, 989, 4_800, 450, 55),
        _gpu("b200-180gb", 183_359, 2_250, 7_700, 900, 55),
    )
}


def find_gpu(kind: str) -> Device:
    """The GPU of this kind.

    Raises:
        UserError: no such kind is known.
    """
    try:
        return GPUS[kind]
    except KeyError:
        raise UserError(f"GPU kind {kind!r} is not known; known: {', '.join(GPUS)}") from None


def machine_memory_bytes() -> int:
    """What this machine's memory holds, or this container's share of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdecimal() else total


def measure_cpu(memory_bytes: int = 0) -> Device:
    """This machine's CPU: bf16 arithmetic and copying, each measured for a moment.

    numpy multiplies in fp32; a CPU with bf16 instructions is taken to be four times as fast in bf16 (measured so with
    AVX-512), another one half as fast.

    Args:
        memory_bytes: to plan with; 0: what the machine has.
    """
    import numpy as np

    size = 1024
    left = np.ones((size, size), dtype=np.float32)
    flops = 2 * size**3 / _fastest_seconds(lambda: left @ left)
    source = np.ones(1 << 25, dtype=np.uint8)
    target = np.empty_like(source)
    bandwidth = 2 * source.nbytes / _fastest_seconds(lambda: np.copyto(target, source))
    factor = 4.0 if _has_bf16() else 0.5
    return Device("cpu", memory_bytes or machine_memory_bytes(), factor * flops, bandwidth, bandwidth, bandwidth)


def _fastest_seconds(action) -> float:
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _has_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
