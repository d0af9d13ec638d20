"""The linear layer with a low-rank update, and several of them that read the same input.

The base weight stays frozen. Formula: y = W x + scaling * B (A x), Hu et al., 2021 (arXiv:2106.09685).

Legend: T tokens, I input features, O output features, R rank.
"""

from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import nn


class LoraLinear(nn.Module):
    """A frozen linear layer and its trainable low-rank update.

    `enabled = False` computes with the base weight alone; `stand_in`, a pair of factors, computes in place of A and B.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.scaling, self.dropout, self.enabled = scaling, dropout, True
        self.stand_in: tuple[torch.Tensor, torch.Tensor] | None = None
        self.resize(rank)

    def resize(self, rank: int) -> None:
        """New factors of this rank: A uninitialised, B zero."""
        weight = self.base.weight
        self.A = nn.Parameter(torch.empty(rank, self.base.in_features, dtype=weight.dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(self.base.out_features, rank, dtype=weight.dtype, device=weight.device))

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B, or what stands in for them."""
        return self.stand_in or (self.A, self.B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.enabled:
            return self.base(x)
        a, b = self.factors
        if self.dropout and self.training:
            return self.base(x) + self.scaling * F.linear(F.linear(F.dropout(x, self.dropout), a), b)
        [y] = _LoraProducts.apply(x, (self.scaling,), self.base.weight, self.base.bias, a, b)
        return y


def project(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """What each of the layers makes of the same input; adapters pass over it, and over its gradient, together.

    An engine may have put `products` on the first of them, which makes all at once.
    """
    products = layers[0].__dict__.get("products")
    if products is not None:
        return products(x)
    adapted = [layer for layer in layers if _joinable(layer)]
    if len(adapted) < len(layers):
        return [layer(x) for layer in layers]
    tensors = [t for layer in adapted for t in (layer.base.weight, layer.base.bias, *layer.factors)]
    return list(_LoraProducts.apply(x, tuple(layer.scaling for layer in adapted), *tensors))


def _joinable(layer: nn.Module) -> TypeGuard[LoraLinear]:
    """Whether the layer is an adapter at work, with weights that need no hook to be put together (ZeRO's)."""
    if not isinstance(layer, LoraLinear) or not layer.enabled or (layer.dropout and layer.training):
        return False
    return not any(hasattr(parameter, "ds_id") for parameter in (layer.base.weight, *layer.factors))


class _LoraProducts(torch.autograd.Function):
    """x W^T + bias + s (x A^T) B^T of every layer; no temporary of the input's or an output's size is made.

    The arguments behind the scalings are each layer's weight, bias (or None), A and B; weights and biases are frozen.
    """

    @staticmethod
    def forward(ctx, x, scalings, *tensors):
        weights, biases, a, b = (tensors[place::4] for place in range(4))
        rows_TI = x.reshape(-1, x.shape[-1])
        ctx.ranks = [factor.shape[0] for factor in a]
        low_TR = rows_TI @ torch.cat(a).T
        outputs = []
        for scaling, weight, bias, low, factor in zip(
            scalings, weights, biases, low_TR.split(ctx.ranks, 1), b, strict=True
        ):
            y_TO = rows_TI @ weight.T if bias is None else torch.addmm(bias, rows_TI, weight.T)
            y_TO.addmm_(low, factor.T, alpha=scaling)
            outputs.append(y_TO.view(*x.shape[:-1], weight.shape[0]))
        ctx.save_for_backward(x, low_TR, *weights, *a, *b)
        ctx.scalings = scalings
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[override]
        x, low_TR, *tensors = ctx.saved_tensors
        count = len(ctx.ranks)
        weights, a, b = (tensors[place * count : (place + 1) * count] for place in range(3))
        rows_TI = x.reshape(-1, x.shape[-1])
        d_x = None
        d_lows, d_b = [], []
        for scaling, gradient, weight, low, factor in zip(
            ctx.scalings, gradients, weights, low_TR.split(ctx.ranks, 1), b, strict=True
        ):
            d_y = gradient.reshape(-1, weight.shape[0])
            d_lows.append((d_y @ factor).mul_(scaling))
            d_b.append((low.T.contiguous() @ d_y).mul_(scaling).T.contiguous())
            if ctx.needs_input_grad[0]:
                d_x = d_y @ weight if d_x is None else d_x.addmm_(d_y, weight)
        d_low_TR = torch.cat(d_lows, 1)
        d_a = (d_low_TR.T @ rows_TI).split(ctx.ranks)
        if d_x is not None:
            d_x = d_x.addmm_(d_low_TR, torch.cat(list(a))).view(x.shape)
        return d_x, None, *(part for pair in zip(d_a, d_b, strict=True) for part in (None, None, *pair))
