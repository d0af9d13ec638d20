"""Packed attention cut into pieces: which rows are queries, which are keys, and the products between them.

Legend: n prompts in a piece, G completions of a prompt in a piece, C query rows of a completion in a piece, L keys of
its own that they see, P longest prompt, T packed tokens (row T is a row of zeros, to which all padding points), K
key/value heads, M query heads a key/value head.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

CHUNK_ELEMENTS = 1 << 20  # attention scores held at once: about what a core keeps in its second-level cache
_FEWEST_ROWS = 64  # query rows of a piece, if scores must be cut even within a completion


class GroupLayout(Protocol):
    """Where prompts and completions lie in the packed row; see `PackedBatch`."""

    prompt_index_NP: torch.Tensor
    fed_index_NGC: torch.Tensor


@dataclass(frozen=True)
class Piece:
    """Some query rows of some prompts or completions, and the keys that they see.

    Scores stand keys first, (…, L, C·M): what is taken over the keys of a row is then taken over whole vectors of rows.
    Rows of heads are taken by places: packed row times K plus key/value head.

    Attributes:
        query_place: of the queries, (n, K, G, C).
        key_place: of the completions' own keys, (n, K, G, L).
        prompt_place: of the shared prompts' keys, (n, K, P); None for the prompts' own attention.
        future: added to own scores, (L, C·M): 0, or -inf for what a query row must not see.
    """

    query_place: torch.Tensor
    key_place: torch.Tensor
    prompt_place: torch.Tensor | None
    future: torch.Tensor

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        """Packed (T + 1, H, E) to (n, K, G, C·M, E)."""
        return _take(rows, self.query_place).view(*self.query_place.shape[:3], -1, rows.shape[-1])

    def own_scores(self, q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Own rows · q^T without what lies in a query's future, shape (n, K, G, L, C·M)."""
        return self.own_products(q, rows).add_(self.future)

    def own_products(self, q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Own rows · q^T, shape (n, K, G, L, C·M)."""
        return (_take(rows, self.key_place).flatten(0, 2) @ q.flatten(0, 2).transpose(1, 2)).view(
            *q.shape[:3], -1, q.shape[3]
        )

    def prompt_scores(self, q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Prompt rows · q^T, shape (n, K, P, G·C·M); one product a prompt."""
        flat = q.flatten(2, 3).flatten(0, 1)
        return (self._prompt(rows) @ flat.transpose(1, 2)).view(*q.shape[:2], -1, flat.shape[1])

    def own_mix(self, weights: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
        """weights^T · own rows' first `size` columns, shape (n, K, G, C·M, size)."""
        keys = _take(rows, self.key_place).flatten(0, 2)[..., :size]
        return (weights.flatten(0, 2).transpose(1, 2) @ keys).view(*weights.shape[:3], -1, size)

    def prompt_mix(self, weights: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
        """weights^T · prompt rows' first `size` columns, shape (n, K, G, C·M, size)."""
        mixed = weights.flatten(0, 1).transpose(1, 2) @ self._prompt(rows)[..., :size]
        return mixed.view(*self.query_place.shape[:3], -1, size)

    def add_own(self, to: torch.Tensor, weights: torch.Tensor, q: torch.Tensor) -> None:
        """to[own keys] += weights · q."""
        _add(to, self.key_place, weights.flatten(0, 2) @ q.flatten(0, 2))

    def add_prompt(self, to: torch.Tensor, weights: torch.Tensor, q: torch.Tensor) -> None:
        """to[prompt keys] += weights · q, summed over the completions."""
        assert self.prompt_place is not None
        _add(to, self.prompt_place, weights.flatten(0, 1) @ q.flatten(2, 3).flatten(0, 1))

    def put(self, to: torch.Tensor, blocks: torch.Tensor) -> None:
        """to[query rows] = blocks, from (n, K, G, C·M, E)."""
        place = self.query_place.flatten()
        by_place = to.view(to.shape[0] * self.query_place.shape[1], -1)
        by_place.index_copy_(0, place, blocks.reshape(place.numel(), -1))

    def _prompt(self, rows: torch.Tensor) -> torch.Tensor:
        assert self.prompt_place is not None
        return _take(rows, self.prompt_place).flatten(0, 1)


def pieces(layout: GroupLayout, heads: int, kv_heads: int, dtype: torch.dtype) -> Iterator[Piece]:
    """The prompts' own attention, then the completions'; no piece has more than about `CHUNK_ELEMENTS` scores."""
    prompts = layout.prompt_index_NP
    yield from _cut(prompts[:, None, :], None, heads, kv_heads, dtype)
    if layout.fed_index_NGC.numel():
        yield from _cut(layout.fed_index_NGC, prompts, heads, kv_heads, dtype)


def _cut(
    own_NGC: torch.Tensor, prompts_NP: torch.Tensor | None, heads: int, kv_heads: int, dtype: torch.dtype
) -> Iterator[Piece]:
    n, g, c = own_NGC.shape
    room = CHUNK_ELEMENTS // (heads * (c + (0 if prompts_NP is None else prompts_NP.shape[1])))  # query rows
    rows = min(c, max(_FEWEST_ROWS, room))
    completions = min(g, max(1, room // c))
    prompts = max(1, room // (g * c))
    place_C = torch.arange(c, device=own_NGC.device)
    own_NKGC = _places(own_NGC, kv_heads)
    prompts_NKP = None if prompts_NP is None else _places(prompts_NP, kv_heads)
    for row in range(0, c, rows):
        end = min(c, row + rows)
        future = torch.zeros(end, end - row, dtype=dtype, device=own_NGC.device)
        future.masked_fill_(place_C[:end, None] > place_C[row:end], float("-inf"))
        future = future.repeat_interleave(heads // kv_heads, 1)
        for first in range(0, n, prompts):
            prompt_place = None if prompts_NKP is None else prompts_NKP[first : first + prompts]
            for member in range(0, g, completions):
                own = own_NKGC[first : first + prompts, :, member : member + completions]
                yield Piece(own[..., row:end], own[..., :end], prompt_place, future)


def _places(index: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Packed rows (n, …) to places (n, K, …)."""
    heads = torch.arange(kv_heads, device=index.device).view(-1, *(1 for _ in index.shape[1:]))
    return index[:, None] * kv_heads + heads


def _take(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Packed rows (T + 1, H or K, E) at the places, shape (*places, E of all the place's heads)."""
    kv_heads = place.shape[1]
    return rows.view(rows.shape[0] * kv_heads, -1).index_select(0, place.flatten()).view(*place.shape, -1)


def _add(to: torch.Tensor, place: torch.Tensor, rows: torch.Tensor) -> None:
    """to[places] += the rows' first columns. A place that is there twice is padding's: whatever comes of it."""
    size = to.shape[-1]
    flat, where = to.view(-1, size), place.flatten()
    flat.index_copy_(0, where, flat.index_select(0, where).add_(rows.flatten(0, -2)[:, :size]))
