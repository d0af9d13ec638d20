"""Leaner element-wise layers: fewer passes over memory and fewer saved activations than transformers' own.

On a CPU the norms, the rotary positions and the gated activation of a small model cost about as much as its matrix
products. Each function here saves only its inputs, and the norms work in pieces that stay in the processor's cache.

Legend: T tokens, D features.
"""

from collections.abc import Iterator
from types import MethodType

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from tuneloop.models.attention import AttentionContext, refuse_unsupported
from tuneloop.models.lora_linear import project

_PIECE_ELEMENTS = 1 << 18  # fp32 elements of one piece: a megabyte, inside a core's L2 cache

# Root-mean-square norms that compute weight * (x / rms(x)), with x / rms(x) rounded to the model's dtype first.
_NORMS = {"LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm", "SmolLM3RMSNorm"}
_ATTENTIONS = {"LlamaAttention", "Qwen2Attention", "Qwen3Attention", "MistralAttention"}
_GATED = {"LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP", "SmolLM3MLP"}

# Projections of one input; `projected_together` of a fused module holds those that it makes at once.
_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")


class _RmsNorm(torch.autograd.Function):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis; the weight is frozen."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        out, inverse_T1 = _normed(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse_T1)
        return out

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        x, weight, inverse_T1 = ctx.saved_tensors
        rows_TD = x.reshape(-1, x.shape[-1])
        gradient_TD = gradient.reshape(rows_TD.shape)
        out = torch.empty_like(rows_TD)
        scale = weight.float()
        for part in _pieces(rows_TD):
            inverse, values = inverse_T1[part], rows_TD[part].float()
            incoming = gradient_TD[part].to(torch.float32, copy=True).mul_(scale)
            inner = torch.linalg.vecdot(incoming, values).div_(values.shape[-1])
            incoming.addcmul_(values, inner[:, None] * inverse.square(), value=-1.0)
            torch.mul(incoming, inverse, out=out[part])
        return out.view_as(gradient), None, None


def _normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and 1/rms of every row (T, 1) in fp32."""
    rows_TD = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows_TD)
    inverse_T1 = torch.empty(rows_TD.shape[0], 1, device=x.device)
    for part in _pieces(rows_TD):
        values = rows_TD[part].to(torch.float32, copy=True)  # worked on in place
        inverse = torch.linalg.vector_norm(values, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse = inverse.add_(epsilon).rsqrt_()
        inverse_T1[part] = inverse
        torch.mul(values.mul_(inverse).to(x.dtype), weight, out=out[part])
    return out.view_as(x), inverse_T1


class _SiluTimes(torch.autograd.Function):
    """silu(gate) * up; saves both inputs and nothing else."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        gate, up = ctx.saved_tensors
        d_up = F.silu(gate).mul_(gradient)
        d_gate = gradient * up
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, d_up


class _Rotation(torch.autograd.Function):
    """Rotary positions (Su et al., arXiv:2104.09864) on (T, H, D); the second half of D is the first's partner."""

    @staticmethod
    def forward(ctx, x_THD, cos_TD, sin_TD):
        ctx.save_for_backward(cos_TD, sin_TD)
        return _rotated(x_THD, cos_TD, sin_TD, 1.0)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        cos_TD, sin_TD = ctx.saved_tensors
        return _rotated(gradient, cos_TD, sin_TD, -1.0), None, None


def _rotated(x_THD: torch.Tensor, cos_TD: torch.Tensor, sin_TD: torch.Tensor, sign: float) -> torch.Tensor:
    half = x_THD.shape[-1] // 2
    first, second = x_THD[..., :half], x_THD[..., half:]
    cos, sin = cos_TD[:, None, :half], sin_TD[:, None, :half]
    out = torch.empty_like(x_THD, memory_format=torch.contiguous_format)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin, value=sign)
    return out


def fuse(model: PreTrainedModel) -> None:
    """Replace attention, norms and gated activations of classes that are known to compute these formulas, in place.

    Layers of other classes, and weights that are trained, keep transformers' own forward.
    """
    for module in model.modules():
        name = type(module).__name__
        if name in _ATTENTIONS:
            module.forward = MethodType(_attention_forward, module)
            module.__dict__["projected_together"] = [_QUERY_KEY_VALUE]
        elif name in _NORMS:
            module.forward = MethodType(_norm_forward, module)
        elif name in _GATED and isinstance(module.act_fn, nn.SiLU | SiLUActivation):
            module.forward = MethodType(_gated_forward, module)
            module.__dict__["projected_together"] = [_GATE_UP]


def _norm_forward(self, x: torch.Tensor) -> torch.Tensor:
    if self.weight.requires_grad:
        return type(self).forward(self, x)
    if not torch.is_grad_enabled():
        return _normed(x, self.weight, self.variance_epsilon)[0]
    return _RmsNorm.apply(x, self.weight, self.variance_epsilon)


def _gated_forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(_SiluTimes.apply(*project([getattr(self, name) for name in _GATE_UP], x)))


def _attention_forward(
    self,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    *_: object,
    context: AttentionContext,
    **__: object,
) -> tuple[torch.Tensor, None]:
    if hasattr(self, "sliding_window"):  # of this layer
        refuse_unsupported(self.sliding_window)
    elif getattr(self.config, "use_sliding_window", True):
        refuse_unsupported(getattr(self.config, "sliding_window", None))
    x_TD = hidden_states[0]
    query, key, value = (
        projected.view(x_TD.shape[0], -1, self.head_dim)
        for projected in project([getattr(self, name) for name in _QUERY_KEY_VALUE], x_TD)
    )
    if hasattr(self, "q_norm"):
        query, key = self.q_norm(query), self.k_norm(key)
    cos_TD, sin_TD = (part[0] for part in position_embeddings)
    query, key = _Rotation.apply(query, cos_TD, sin_TD), _Rotation.apply(key, cos_TD, sin_TD)
    out_THD = context.attend(self.layer_idx, query, key, value, self.scaling)
    return self.o_proj(out_THD.reshape(1, x_TD.shape[0], -1)), None


def _pieces(rows_TD: torch.Tensor) -> Iterator[slice]:
    size = max(1, _PIECE_ELEMENTS // rows_TD.shape[1]) if rows_TD.device.type == "cpu" else rows_TD.shape[0]
    for first in range(0, rows_TD.shape[0], max(size, 1)):
        yield slice(first, first + size)
