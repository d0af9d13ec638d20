"""What allocators do with memory that training frees."""

import ctypes
import gc

# For a process that trains, from its start: glibc's per-thread caches keep small pieces between large ones, which then
# do not join when they are freed, and the heap grows by a pass's activations whenever a batch is a little larger.
TRAINING_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}

# mallopt(3), glibc's numbers for its parameters.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_MMAP_THRESHOLD = 32 << 20


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next allocation instead of giving it back to the system.

    Training on a CPU frees gigabytes of activations in every pass and asks for them again in the next one; each page
    that comes back from the system costs a fault, 2 to 12 microseconds in a virtual machine: seconds an update. The
    peak stays the same. Elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, -1)
    mallopt(_ARENA_MAX, 1)  # autograd's thread frees into the heap that the forward pass asks


def release_gpu_memory() -> None:
    """Give what torch keeps of freed GPU memory back to the driver, so that another process can have it."""
    import torch

    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
