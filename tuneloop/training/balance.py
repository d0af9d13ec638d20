"""Sharing work between processes so that they finish together."""

import heapq
from collections.abc import Sequence
from itertools import count


def partition(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices of each part, the parts' total costs nearly equal: Karmarkar and Karp's largest differencing method.

    Karmarkar & Karp, "The differencing method of set partitioning", 1982; k-way as in Korf, IJCAI 2009. Deterministic.

    Args:
        costs: not negative, one a piece of work.
        parts: how many.

    Returns:
        For each part the sorted indices; parts may be empty when there are fewer pieces than parts.
    """
    if parts == 1:
        return [list(range(len(costs)))]
    order = count()
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for index, cost in enumerate(costs):
        buckets = [(0.0, []) for _ in range(parts - 1)] + [(float(cost), [index])]
        heapq.heappush(heap, (-float(cost), next(order), buckets))
    if not heap:
        return [[] for _ in range(parts)]
    while len(heap) > 1:
        one, two = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        merged = [
            (one[place][0] + two[parts - 1 - place][0], one[place][1] + two[parts - 1 - place][1])
            for place in range(parts)
        ]
        merged.sort(key=lambda bucket: bucket[0])
        heapq.heappush(heap, (merged[0][0] - merged[-1][0], next(order), merged))
    return [sorted(indices) for _, indices in heap[0][2]]
