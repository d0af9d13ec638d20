"""Counter-based random numbers: a pure function of a key and a counter, so nothing depends on order or batching.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(key: int, counters: np.ndarray) -> np.ndarray:
    """Four random 32-bit words for every counter.

    Args:
        key: 64 bits.
        counters: unsigned integers below 2**32, shape (n, 4).

    Returns:
        uint32 array of shape (n, 4).
    """
    low, high = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    c0, c1, c2, c3 = (counters[:, i].astype(np.uint64) for i in range(4))
    for _ in range(10):
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> _SHIFT) ^ c1 ^ np.uint64(low),
            second & _MASK,
            (first >> _SHIFT) ^ c3 ^ np.uint64(high),
            first & _MASK,
        )
        low, high = (low + _WEYL[0]) & 0xFFFFFFFF, (high + _WEYL[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(key: int, counters: np.ndarray) -> np.ndarray:
    """One uniform float64 in [0, 1) with 53 random bits for every counter of shape (n, 4)."""
    words = philox(key, counters).astype(np.uint64)
    return ((words[:, 0] >> np.uint64(5)) * np.uint64(1 << 26) + (words[:, 1] >> np.uint64(6))) / float(1 << 53)


def permutation(key: int, round_: int, size: int) -> np.ndarray:
    """A random order of range(size) that depends on (key, round) alone."""
    counters = np.zeros((size, 4), dtype=np.uint64)
    counters[:, 0], counters[:, 1], counters[:, 3] = round_, np.arange(size), 0xFFFFFFFF
    return np.argsort(uniforms(key, counters), kind="stable")
