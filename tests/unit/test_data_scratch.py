"""Arrays and hash tables in scratch files."""

import errno

import numpy as np
import pytest

from tuneloop.data.scratch import GrowingArray, HashTable


def test_an_array_keeps_its_content_when_it_grows(tmp_path):
    array = GrowingArray(tmp_path / "a", np.int32, width=3, rows=2)
    array.data[:] = [[1, 2, 3], [4, 5, 6]]
    array.reserve(2)
    assert len(array.data) == 2
    array.reserve(1_000)
    assert array.data[:3].tolist() == [[1, 2, 3], [4, 5, 6], [0, 0, 0]]
    assert len(array.data) >= 1_000


def test_a_full_disk_is_an_error_before_anything_is_mapped(tmp_path, monkeypatch):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        import signal

        previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is compared below
            GrowingArray(tmp_path / "a", np.int64, rows=10_000)
        signal.signal(signal.SIGXFSZ, previous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)


@pytest.mark.parametrize("words", [1, 2])
def test_a_table_agrees_with_a_set(tmp_path, words):
    rng = np.random.default_rng(0)
    table, known = HashTable(tmp_path, "t", words), set()
    for _ in range(20):  # 40,000 keys: the table grows more than once
        keys = rng.integers(0, 40_000, (2_000, words), np.uint64)
        keys[:, 0] //= np.uint64(1 if words == 1 else 400)
        keys[~keys.any(axis=1), -1] = 1
        slots, new = table.insert(keys)
        for key, is_new in zip(map(tuple, keys.tolist()), new, strict=True):
            assert is_new == (key not in known)
            known.add(key)
        assert len(set(slots.tolist())) == len(set(map(tuple, keys.tolist())))
    assert table.count == len(known)


def test_the_key_that_marks_an_empty_slot_counts_as_its_neighbour(tmp_path):
    table = HashTable(tmp_path, "t", words=2)
    assert table.insert(np.array([[0, 0], [0, 2]], np.uint64))[1].tolist() == [True, True]
    assert table.insert(np.array([[0, 0], [0, 1], [0, 3]], np.uint64))[1].tolist() == [False, False, True]


def test_values_survive_growth_and_absent_keys_have_none(tmp_path):
    table = HashTable(tmp_path, "t", words=1)
    keys = np.random.default_rng(1).permutation(np.arange(1, 50_001, dtype=np.uint64)).reshape(-1, 1)
    for start in range(0, len(keys), 5_000):
        part = keys[start : start + 5_000]
        slots, new = table.insert(part)
        assert new.all()
        table.values[slots] = part[:, 0].astype(np.int32)
    assert np.array_equal(table.find(keys), keys[:, 0].astype(np.int32))
    assert not table.find(keys + np.uint64(50_000)).any()
    assert len(list(tmp_path.iterdir())) == 2  # outgrown files are gone
