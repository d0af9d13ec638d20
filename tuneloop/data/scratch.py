"""Arrays in memory-mapped scratch files: they grow with the data, the process's own memory does not.

The kernel writes their pages back and drops them when memory is short. Space is allocated before it is mapped, so that
a full disk is an `OSError` and not a SIGBUS.
"""

import os
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: Fibonacci hashing (Knuth, vol. 3, 6.4)


class GrowingArray:
    """A zero-filled array whose first axis can grow.

    Args:
        path: the scratch file; made here, removed by whoever owns the folder.
        dtype: of the elements.
        width: length of the second axis.
    """

    def __init__(self, path: Path, dtype: DTypeLike, width: int = 1, rows: int = 1024):
        self._path, self._dtype, self._width = path, np.dtype(dtype), width
        self.data = self._map(rows)

    def reserve(self, rows: int) -> None:
        """Make room for at least so many rows, at least doubling."""
        if rows > len(self.data):
            self.data = self._map(max(rows, 2 * len(self.data)))

    def _map(self, rows: int) -> np.ndarray:
        with open(self._path, "ab") as file:
            os.posix_fallocate(file.fileno(), 0, rows * self._width * self._dtype.itemsize)
        return np.memmap(self._path, self._dtype, "r+", shape=(rows, self._width))


class HashTable:
    """Keys of one or two 64-bit words to a small number, by open addressing with linear probing.

    A slot is at most half used; the memory is 2 to 4 slots of `8 * words + 4` bytes a key.

    Args:
        folder: where the scratch files go.
        name: prefix of their names.
        words: 64-bit words of a key.
    """

    def __init__(self, folder: Path, name: str, words: int):
        self._folder, self._name, self._words = folder, name, words
        self._generation, self.count = 0, 0
        self._allocate(1 << 14)

    def insert(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Make sure that the keys are in the table.

        Args:
            keys: (N, words) uint64, repeats allowed.

        Returns:
            slots: (N,) where each key lies until the next insert.
            new: (N,) whether the key came in now; of repeats, the first one only.
        """
        self._reserve(self.count + len(keys))
        unique, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        slots, is_new = self._probe(_without_zero(unique), claim=True)
        self.count += int(is_new.sum())
        new = np.zeros(len(keys), bool)
        new[first[is_new]] = True
        return slots[inverse.reshape(-1)], new

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The value of each key, 0 where the key is not in the table."""
        slots, absent = self._probe(_without_zero(keys), claim=False)
        values = self.values[slots]
        values[absent] = 0
        return values

    def _probe(self, keys: np.ndarray, claim: bool) -> tuple[np.ndarray, np.ndarray]:
        """Slots of the (distinct, if `claim`) keys, and whether each slot was empty before."""
        mask = np.uint64(len(self._keys) - 1)
        slots = ((keys[:, 0] * _HASH_FACTOR + keys[:, -1]) >> np.uint64(17)) & mask
        empty = np.zeros(len(keys), bool)
        pending = np.arange(len(keys))
        while len(pending):
            found = self._keys[slots[pending]]
            free = ~found.any(axis=1)
            if claim and free.any():
                claimants = pending[free]
                _, winners = np.unique(slots[claimants], return_index=True)
                winners = claimants[winners]
                self._keys[slots[winners]] = keys[winners]
                empty[winners] = True
                done = (found == keys[pending]).all(axis=1) | empty[pending]
            else:
                empty[pending[free]] = True
                done = (found == keys[pending]).all(axis=1) | free
            lost = free & ~done  # another key took the slot: probe it again, it is not empty any more
            pending = pending[~done]
            advance = pending[~lost[~done]]
            slots[advance] = (slots[advance] + np.uint64(1)) & mask
        return slots, empty

    def _reserve(self, count: int) -> None:
        if 2 * count <= len(self._keys):
            return
        old_keys, old_values, old_path = self._keys, self.values, self._path("*")
        stale = list(self._folder.glob(old_path))
        self._allocate(1 << (2 * count).bit_length())
        for start in range(0, len(old_keys), 1 << 16):
            keys = np.array(old_keys[start : start + (1 << 16)])
            used = keys.any(axis=1)
            slots, _ = self._probe(keys[used], claim=True)
            self.values[slots] = old_values[start : start + (1 << 16)][used]
        for path in stale:
            path.unlink()

    def _allocate(self, slots: int) -> None:
        self._generation += 1
        self._keys = GrowingArray(self._folder / self._path("keys"), np.uint64, self._words, slots).data
        self.values = GrowingArray(self._folder / self._path("values"), np.int32, 1, slots).data.reshape(-1)

    def _path(self, part: str) -> str:
        return f"{self._name}.{self._generation}.{part}"


def _without_zero(keys: np.ndarray) -> np.ndarray:
    """The keys, with the one that marks an empty slot moved to its neighbour."""
    keys = np.ascontiguousarray(keys, np.uint64)
    zero = ~keys.any(axis=1)
    if zero.any():
        keys = keys.copy()
        keys[zero, -1] = 1
    return keys
