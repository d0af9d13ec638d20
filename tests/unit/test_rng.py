"""Philox against the published known answers, and the numbers made from it."""

import numpy as np
import pytest

from tuneloop.rng import permutation, philox, uniforms
from tuneloop.training.data_order import rows_of_update


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # kat_vectors of Random123, philox4x32-10
        (0, [0, 0, 0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [2**32 - 1] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            0x299F31D0_A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(key: int, counter: list[int], expected: list[int]):
    assert philox(key, np.array([counter], dtype=np.uint64))[0].tolist() == expected


def test_uniforms_depend_on_the_counter_alone():
    counters = np.stack([np.arange(1000), np.zeros(1000), np.ones(1000), np.arange(1000) % 7], axis=1).astype(np.uint64)
    together = uniforms(5, counters)
    alone = np.array([uniforms(5, counters[i : i + 1])[0] for i in range(1000)])
    assert (together == alone).all()
    assert together.min() >= 0.0
    assert together.max() < 1.0
    assert abs(together.mean() - 0.5) < 4 * np.sqrt(1 / 12 / 1000)
    assert len(set(together.tolist())) == 1000


def test_another_key_gives_other_numbers():
    counters = np.zeros((1, 4), dtype=np.uint64)
    assert uniforms(1, counters)[0] != uniforms(2, counters)[0] != uniforms(1 + 2**40, counters)[0]


def test_permutation_is_one():
    order = permutation(3, 0, 500)
    assert sorted(order.tolist()) == list(range(500))
    assert order.tolist() != permutation(3, 1, 500).tolist()


def test_every_row_is_seen_once_an_epoch():
    rows = [row for update in range(10) for row in rows_of_update(7, update, per_update=6, rows=20)]
    for epoch in range(3):
        assert sorted(rows[20 * epoch : 20 * epoch + 20]) == list(range(20))


def test_an_update_larger_than_the_data_repeats_rows():
    assert sorted(rows_of_update(0, 0, per_update=6, rows=3)) == [0, 0, 1, 1, 2, 2]
