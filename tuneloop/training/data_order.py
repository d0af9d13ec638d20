"""Which rows an update trains on: a pure function of the seed and the update."""

from tuneloop.rng import permutation


def rows_of_update(seed: int, update: int, per_update: int, rows: int) -> list[int]:
    """Row numbers of an update (from 0): epoch after epoch, each in an order of its own, nothing left out.

    Args:
        seed: the run's seed.
        update: from 0.
        per_update: rows an update takes; more than `rows` is allowed and repeats some.
        rows: rows there are.
    """
    chosen: list[int] = []
    place = update * per_update
    while len(chosen) < per_update:
        epoch, offset = divmod(place + len(chosen), rows)
        order = permutation(seed, epoch, rows)
        chosen.extend(order[offset : offset + per_update - len(chosen)].tolist())
    return chosen
