"""Sharing work between processes so that they finish together. This module does not import torch."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tuneloop.models.packed import Group


@dataclass(frozen=True)
class GroupCost:
    """What a group costs a transformer, in units of one attention score over all heads and layers.

    A sequence of L tokens costs `linear` L + L^2: the products with the layers' weights, 2 n_layer L operations, over
    those of attention, 4 d_attention L^2 (scores and weighted values, nothing skipped for causality). For a 7B with
    n_layer = 12 d^2 and d = 4096 that is 24576 L + L^2.

    Attributes:
        linear: n_layer / (2 d_attention), with n_layer the weights of a layer's linear maps.
    """

    linear: float

    @classmethod
    def of(cls, config: Any) -> "GroupCost":
        """From a transformers config of a Llama-like decoder; without its sizes, n_layer = 12 d^2 is assumed."""
        hidden = config.hidden_size
        heads = getattr(config, "num_attention_heads", None)
        inner = getattr(config, "intermediate_size", None)
        if not heads or not inner:
            return cls(6.0 * hidden)
        head_size = getattr(config, "head_dim", None) or hidden // heads
        queries = heads * head_size
        keys = (getattr(config, "num_key_value_heads", None) or heads) * head_size
        return cls((2 * hidden * (queries + keys) + 3 * hidden * inner) / (2 * queries))

    def __call__(self, group: "Group") -> float:
        """The prompt is computed once; every fed completion token sees it and its own completion."""
        prompt, completions = group
        fed = [len(completion) - 1 for completion in completions]
        attention = len(prompt) ** 2 + sum(own * (len(prompt) + own) for own in fed)
        return self.linear * (len(prompt) + sum(fed)) + attention


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
