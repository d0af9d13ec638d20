"""Attention over packed groups: prompts causally, completions over their shared prompt and themselves.

The G completions of a prompt read one copy of its keys and values, as one matrix product a prompt (the idea of
Hydragen, arXiv:2402.05099, in training). Scores are made chunk by chunk and made again in the backward pass, so they
never stand whole in memory, and gradients go straight back to the packed rows.

Legend: n prompts in a chunk, G completions a prompt, P longest prompt, C longest completion input, T packed tokens,
K key/value heads, M query heads a key/value head, D head size.
"""

from typing import Protocol

import torch

CHUNK_ELEMENTS = 1 << 22  # attention scores held at once


class GroupLayout(Protocol):
    """Where prompts and completions lie in the packed row; see `PackedBatch`."""

    prompt_index_NP: torch.Tensor
    prompt_length_N: torch.Tensor
    fed_index_NGC: torch.Tensor
    fed_length_NG: torch.Tensor


class GroupedAttention(torch.autograd.Function):
    """(query_THD, key_TKD, value_TKD, batch, scaling) -> output_THD; T = prompt tokens then completion tokens."""

    @staticmethod
    def forward(ctx, query, key, value, batch: GroupLayout, scaling: float):
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for piece in _pieces(batch, query.shape[1]):
            blocks = piece.unpack(query, key, value)
            out[piece.own_rows] = piece.pack_own(_output(*blocks, piece.probabilities(*blocks[:3], scaling)))
        ctx.save_for_backward(query, key, value)
        ctx.batch, ctx.scaling = batch, scaling
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for piece in _pieces(ctx.batch, query.shape[1]):
            q, k_prompt, k_own, v_prompt, v_own = blocks = piece.unpack(query, key, value)
            weights = piece.probabilities(*blocks[:3], ctx.scaling)
            d_out = piece.unpack_gradient(gradient, heads=key.shape[1])
            d_weights = products(d_out, v_prompt, v_own)
            inner = (d_weights * weights).sum(-1, keepdim=True)
            d_scores = (d_weights.sub_(inner).mul_(weights)).mul_(ctx.scaling).to(q.dtype)
            weights = weights.to(q.dtype)
            d_query[piece.own_rows] = piece.pack_own(combine(d_scores, k_prompt, k_own))
            d_key_prompt, d_key_own = _transposed(d_scores, q, k_prompt)
            d_value_prompt, d_value_own = _transposed(weights, d_out, v_prompt)
            d_key[piece.own_rows] += piece.pack_own_keys(d_key_own)
            d_value[piece.own_rows] += piece.pack_own_keys(d_value_own)
            if k_prompt is not None:
                d_key[piece.prompt_rows] += piece.pack_prompt(d_key_prompt)
                d_value[piece.prompt_rows] += piece.pack_prompt(d_value_prompt)
        return d_query, d_key, d_value, None, None


def products(left, prompt, own):
    """left @ [prompt; own]^T in fp32, shape (n, K, G, M·C, P + C)."""
    n, k, g, mc, d = left.shape
    scores = (left.reshape(n * k * g, mc, d) @ own.reshape(n * k * g, -1, d).transpose(1, 2)).view(n, k, g, mc, -1)
    if prompt is None:
        return scores.float()
    shared = (left.reshape(n * k, g * mc, d) @ prompt.flatten(0, 1).transpose(1, 2)).view(n, k, g, mc, -1)
    return torch.cat([shared, scores], dim=-1).float()


def combine(weights, prompt, own):
    """weights @ [prompt; own], shape (n, K, G, M·C, D)."""
    n, k, g, mc, _ = weights.shape
    split = 0 if prompt is None else prompt.shape[2]
    out = weights[..., split:].reshape(n * k * g, mc, -1) @ own.reshape(n * k * g, -1, own.shape[-1])
    if prompt is not None:
        shared = weights[..., :split].reshape(n * k, g * mc, split) @ prompt.flatten(0, 1)
        out = out.add_(shared.view_as(out))
    return out.view(n, k, g, mc, -1)


def _output(q, k_prompt, k_own, v_prompt, v_own, weights):
    return combine(weights.to(q.dtype), v_prompt, v_own)


def _transposed(weights, left, prompt):
    """weights^T @ left: (n, K, P, D) for the prompt's keys, over all completions; (n, K, G, C, D) for the own."""
    n, k, g, mc, d = left.shape
    split = 0 if prompt is None else prompt.shape[2]
    own = weights[..., split:].reshape(n * k * g, mc, -1).transpose(1, 2) @ left.reshape(n * k * g, mc, d)
    own = own.view(n, k, g, -1, d)
    if prompt is None:
        return None, own
    shared = weights[..., :split].reshape(n * k, g * mc, split).transpose(1, 2) @ left.reshape(n * k, g * mc, d)
    return shared.view(n, k, split, d), own


class _Piece:
    """Some prompts' queries: either the prompts' own tokens (prefix None) or their completions' tokens."""

    def __init__(self, own_index_nGC, own_length_nG, prompt_index_nP=None, prompt_length_n=None):
        self.own_index = own_index_nGC
        self.prompt_index = prompt_index_nP
        device = own_index_nGC.device
        place_C = torch.arange(own_index_nGC.shape[2], device=device)
        self._own_ok = place_C < own_length_nG[..., None]
        self._own_where = self._own_ok.flatten().nonzero().squeeze(1)
        self.own_rows = own_index_nGC.flatten()[self._own_where]
        self._future_CC = place_C[None, :] > place_C[:, None]
        self._padding = None
        if prompt_index_nP is not None and prompt_length_n is not None:
            prompt_ok = torch.arange(prompt_index_nP.shape[1], device=device) < prompt_length_n[:, None]
            self._prompt_where = prompt_ok.flatten().nonzero().squeeze(1)
            self.prompt_rows = prompt_index_nP.flatten()[self._prompt_where]
            self._padding = None if bool(prompt_ok.all()) else ~prompt_ok[:, None, None, None, None, :]

    def unpack(self, query, key, value):
        """(query, prompt keys, own keys, prompt values, own values), each (n, K, G, …, D)."""
        prompt = self.prompt_index
        return (
            self.unpack_own(query, heads=key.shape[1]),
            None if prompt is None else key[prompt].transpose(1, 2),
            key[self.own_index].permute(0, 3, 1, 2, 4),
            None if prompt is None else value[prompt].transpose(1, 2),
            value[self.own_index].permute(0, 3, 1, 2, 4),
        )

    def unpack_own(self, rows_THD, heads):
        """Packed (T, H, D) to (n, K, G, M·C, D)."""
        n, g, c = self.own_index.shape
        blocks = rows_THD[self.own_index].view(n, g, c, heads, -1, rows_THD.shape[-1])
        return blocks.permute(0, 3, 1, 4, 2, 5).reshape(n, heads, g, -1, rows_THD.shape[-1])

    def unpack_gradient(self, rows_THD, heads):
        """Like `unpack_own`, with zeros where a query is padding: what stands there came from another row."""
        blocks = self.unpack_own(rows_THD, heads)
        n, k, g, _, d = blocks.shape
        by_place = blocks.view(n, k, g, -1, self._own_ok.shape[2], d)
        by_place.masked_fill_(~self._own_ok[:, None, :, None, :, None], 0.0)
        return blocks

    def pack_own(self, blocks):
        """(n, K, G, M·C, D) to packed (rows, H, D)."""
        n, g, c = self.own_index.shape
        heads, size = blocks.shape[1], blocks.shape[-1]
        flat = blocks.view(n, heads, g, -1, c, size).permute(0, 2, 4, 1, 3, 5).reshape(n * g * c, -1, size)
        return flat[self._own_where]

    def pack_own_keys(self, blocks):
        """(n, K, G, C, D) to packed (rows, K, D)."""
        return blocks.permute(0, 2, 3, 1, 4).flatten(0, 2)[self._own_where]

    def pack_prompt(self, blocks):
        """(n, K, P, D) to packed (rows, K, D)."""
        return blocks.transpose(1, 2).flatten(0, 1)[self._prompt_where]

    def probabilities(self, q, k_prompt, k_own, scaling):
        """Attention weights in fp32, shape (n, K, G, M·C, P + C)."""
        scores = products(q, k_prompt, k_own).mul_(scaling)
        n, k, g, mc, length = scores.shape
        c = self._future_CC.shape[0]
        by_place = scores.view(n, k, g, mc // c, c, length)
        by_place[..., length - c :].masked_fill_(self._future_CC, float("-inf"))
        if self._padding is not None:
            by_place[..., : length - c].masked_fill_(self._padding, float("-inf"))
        return scores.softmax(-1)


def _pieces(batch: GroupLayout, heads: int):
    n, longest = batch.prompt_index_NP.shape
    own_index, own_length = batch.prompt_index_NP[:, None, :], batch.prompt_length_N[:, None]
    step = max(1, CHUNK_ELEMENTS // (heads * longest * longest))
    for first in range(0, n, step):
        yield _Piece(own_index[first : first + step], own_length[first : first + step])
    _, g, c = batch.fed_index_NGC.shape
    if g * c == 0:
        return
    step = max(1, CHUNK_ELEMENTS // (heads * g * c * (longest + c)))
    for first in range(0, n, step):
        part = slice(first, first + step)
        yield _Piece(
            batch.fed_index_NGC[part],
            batch.fed_length_NG[part],
            batch.prompt_index_NP[part],
            batch.prompt_length_N[part],
        )
