"""What the operating system knows about this process."""

from pathlib import Path


def peak_rss_bytes() -> int:
    """The most memory that this process has held, from the kernel's high-water mark (not inherited over exec)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line")
