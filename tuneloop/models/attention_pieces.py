"""Packed attention cut into pieces: which rows are queries, which are keys, and the products between them.

Legend: n prompts in a piece, G completions of a prompt in a piece, C query rows of a completion in a piece, L keys of
its own that they see, P longest prompt, T packed tokens (row T is a row of zeros, to which all padding points), K
key/value heads, M query heads a key/value head.
"""

from dataclasses import dataclass
from functools import cache

import torch

CHUNK_ELEMENTS = 1 << 20  # attention scores held at once: about what a core keeps in its second-level cache
_ROWS = 64  # query rows of a piece: what lies in their future is multiplied in vain


@dataclass(frozen=True)
class Piece:
    """Some query rows of some prompts or completions, and the keys that they see.

    Scores stand keys first, (…, L, C·M): what is taken over the keys of a row is then taken over whole vectors of rows.
    Rows of heads are taken by places: packed row times K plus key/value head.

    Attributes:
        query_place: of the queries, (n, K, G, C).
        key_place: of the completions' own keys, (n, K, G, L).
        prompt_place: of the shared prompts' keys, (n, K, P); None for the prompts' own attention.
        future: added to the scores of the last C own keys, (C, C·M): 0, or -inf for what a query row must not see.
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
        scores = self.own_products(q, rows)
        scores[..., -self.future.shape[0] :, :].add_(self.future)
        return scores

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


def pieces(
    prompt_index_NP: torch.Tensor,
    prompt_length_N: torch.Tensor,
    fed_index_NGC: torch.Tensor,
    fed_length_NG: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
) -> list[Piece]:
    """The prompts' own attention, then the completions'; no piece has more than about `CHUNK_ELEMENTS` scores.

    Prompts of similar length share pieces, and no piece is wider than the longest of its own. The indices and lengths
    are those of `PackedBatch`.
    """
    order = prompt_length_N.argsort(stable=True)
    lengths_N, index_NP = prompt_length_N[order], prompt_index_NP[order]
    made = _cut(index_NP[:, None], lengths_N[:, None], None, heads, kv_heads, dtype)
    if fed_index_NGC.numel():
        shared = _Shared(index_NP, lengths_N.tolist())
        made += _cut(fed_index_NGC[order], fed_length_NG[order], shared, heads, kv_heads, dtype)
    return made


@dataclass(frozen=True)
class _Shared:
    """The prompts that completions see, in rising order of length."""

    index_NP: torch.Tensor
    lengths: list[int]


def _cut(
    own_NGC: torch.Tensor,
    length_NG: torch.Tensor,
    shared: _Shared | None,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
) -> list[Piece]:
    n, g, c = own_NGC.shape
    width = c + (shared.index_NP.shape[1] if shared else 0)
    room = CHUNK_ELEMENTS // (heads * width)  # query rows
    rows = min(c, _ROWS)
    members, prompts = min(g, max(1, room // rows)), max(1, room // (g * rows))
    made = []
    for first in range(0, n, prompts):
        chosen = slice(first, first + prompts)
        prompt_place = None
        if shared:
            prompt_place = _places(shared.index_NP[chosen, : shared.lengths[chosen][-1]], kv_heads)
        for member in range(0, g, members):
            some = slice(member, member + members)
            length = int(length_NG[chosen, some].max())
            place = _places(own_NGC[chosen, some, :length], kv_heads)
            for row in range(0, length, rows):
                end = min(length, row + rows)
                future = _future(end - row, heads // kv_heads, dtype, place.device)
                made.append(Piece(place[..., row:end], place[..., :end], prompt_place, future))
    return made


@cache
def _future(rows: int, repeats: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(rows, rows * repeats): -inf where a key comes after a query row."""
    places = torch.arange(rows, device=device)
    future = torch.zeros(rows, rows, dtype=dtype, device=device)
    return future.masked_fill_(places[:, None] > places, float("-inf")).repeat_interleave(repeats, 1)


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
