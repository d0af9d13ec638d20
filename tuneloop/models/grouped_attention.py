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

from typing import Protocol

import torch

from tuneloop.models.attention_pieces import Piece


class GroupLayout(Protocol):
    """Where prompts and completions lie in the packed row; see `PackedBatch`."""

    def pieces(self, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Piece]:
        """How their attention is cut."""
        ...


_HIDDEN = -30_000.0  # added to the score of a key that is padding: exp of it is 0 in every dtype


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
        for piece in layout.pieces(heads, key.shape[1], query.dtype):
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
        for piece in ctx.layout.pieces(heads, key.shape[1], query.dtype):
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
