"""Attention over packed groups: prompts causally, completions over their shared prompt and themselves.

The G completions of a prompt read one copy of its keys and values, as one matrix product a prompt (the idea of
Hydragen, arXiv:2402.05099, in training). Scores are made piece by piece, in the model's dtype, and made again in the
backward pass, so they never stand whole in memory and are passed over as few times as possible: what is subtracted
from every score of a row (its log-sum-exp, and in the backward pass the row's delta), and what hides padding, enter the
matrix product as further columns, which it sums in fp32.

Backward as in FlashAttention-2 (arXiv:2307.08691): P = exp(S - lse), dS = P (dP - delta), delta = sum(dO * O).

Legend: n prompts in a piece, G completions of a prompt in a piece, C query rows of a completion in a piece, L keys of
its own that they see, P longest prompt, T packed tokens (row T is a row of zeros, to which all padding points), K
key/value heads, M query heads a key/value head, D head size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

CHUNK_ELEMENTS = 1 << 20  # attention scores held at once: about what a core keeps in its second-level cache
_FEWEST_ROWS = 64  # query rows of a piece, if scores must be cut even within a completion
_HIDDEN = -30_000.0  # added to the score of a key that is padding: exp of it is 0 in every dtype


class GroupLayout(Protocol):
    """Where prompts and completions lie in the packed row; see `PackedBatch`."""

    prompt_index_NP: torch.Tensor
    fed_index_NGC: torch.Tensor


class GroupedAttention(torch.autograd.Function):
    """(query_THD, key_TKD, value_TKD, layout, scaling) -> output_THD; T = prompt tokens then completion tokens."""

    @staticmethod
    def forward(ctx, query, key, value, layout: GroupLayout, scaling: float):
        tokens, heads, size = query.shape
        rows_q, rows_v = _widened(query, [1.0]), _widened(value, [])
        rows_k = _widened(key, [0.0], scaling)
        rows_k[-1, :, size] = _HIDDEN
        out = query.new_empty(tokens + 1, heads, size)
        lse = torch.empty(tokens + 1, heads, device=query.device)
        for piece in pieces(layout, heads, key.shape[1], query.dtype):
            q = piece.queries(rows_q)
            own = piece.own_scores(q, rows_k)
            top = own.amax(-2, keepdim=True)
            prompt = None if piece.prompt_place is None else piece.prompt_scores(q, rows_k)
            if prompt is not None:
                top = torch.maximum(top, prompt.amax(-2).view_as(top))
                prompt.sub_(top.view_as(prompt[..., :1, :])).exp_()
            own.sub_(top).exp_()
            total = own.sum(-2, dtype=torch.float32)
            mixed = piece.own_mix(own, rows_v, size)
            if prompt is not None:
                total += prompt.sum(-2, dtype=torch.float32).view_as(total)
                mixed += piece.prompt_mix(prompt, rows_v, size)
            piece.put(out, mixed.float().div_(total[..., None]).to(out.dtype))
            piece.put(lse, total.log_().add_(top[..., 0, :]))
        out = out[:tokens]
        ctx.save_for_backward(query, key, value, out, lse[:tokens])
        ctx.layout, ctx.scaling = layout, scaling
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        query, key, value, out, lse = ctx.saved_tensors
        tokens, heads, size = query.shape
        # Sixteen products at a time: such short sums lose nothing in the model's dtype, and are summed on in fp32.
        parts = (gradient * out).unflatten(-1, (-1, 16 if size % 16 == 0 else size))
        delta = parts.sum(-1).float().sum(-1)
        rows_q = _widened(query, [*_two_parts(lse.neg(), query.dtype), 1.0])
        rows_k = _widened(key, [1.0, 1.0, 0.0], ctx.scaling)
        rows_k[-1, :, size + 2] = _HIDDEN
        rows_o = _widened(gradient, _two_parts(delta.neg_(), query.dtype))
        rows_v = _widened(value, [1.0, 1.0])
        d_query = query.new_empty(tokens + 1, heads, size)
        d_key, d_value = (key.new_zeros(tokens + 1, *key.shape[1:]) for _ in range(2))
        for piece in pieces(ctx.layout, heads, key.shape[1], query.dtype):
            q, o = piece.queries(rows_q), piece.queries(rows_o)
            weights = piece.own_scores(q, rows_k).exp_()
            d_scores = piece.own_products(o, rows_v).mul_(weights)
            d_q = piece.own_mix(d_scores, rows_k, size)
            piece.add_own(d_value, weights, o)
            piece.add_own(d_key, d_scores, q)
            if piece.prompt_place is not None:
                weights = piece.prompt_scores(q, rows_k).exp_()
                d_scores = piece.prompt_scores(o, rows_v).mul_(weights)
                d_q += piece.prompt_mix(d_scores, rows_k, size)
                piece.add_prompt(d_value, weights, o)
                piece.add_prompt(d_key, d_scores, q)
            piece.put(d_query, d_q)
        return d_query[:tokens], d_key[:tokens].mul_(ctx.scaling), d_value[:tokens], None, None


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


def _widened(rows: torch.Tensor, further: list, scale: float = 1.0) -> torch.Tensor:
    """Packed rows times `scale` with further columns, and a row of zeros at the end; shape (T + 1, heads, E)."""
    tokens, heads, size = rows.shape
    wide = rows.new_empty(tokens + 1, heads, size + len(further))
    torch.mul(rows, scale, out=wide[:tokens, :, :size])
    for place, column in enumerate(further):
        wide[:tokens, :, size + place] = column
    wide[tokens] = 0.0
    return wide


def _two_parts(values: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Two numbers of `dtype` whose sum is `values` to twice that precision."""
    high = values.to(dtype)
    return [high, (values - high.float()).to(dtype)]


def _take(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Packed rows (T + 1, H or K, E) at the places, shape (*places, E of all the place's heads)."""
    kv_heads = place.shape[1]
    return rows.view(rows.shape[0] * kv_heads, -1).index_select(0, place.flatten()).view(*place.shape, -1)


def _add(to: torch.Tensor, place: torch.Tensor, rows: torch.Tensor) -> None:
    """to[places] += the rows' first columns. A place that is there twice is padding's: whatever comes of it."""
    size = to.shape[-1]
    flat, where = to.view(-1, size), place.flatten()
    flat.index_copy_(0, where, flat.index_select(0, where).add_(rows.flatten(0, -2)[:, :size]))
