"""One attention implementation for every Hugging Face decoder: the caller's context decides who sees whom.

Registered with transformers as `tuneloop`; the context travels as a keyword argument of the model's forward. Tokens
come packed, batch size 1, so that linear layers never see padding.

Legend: T packed tokens, H query heads, K key/value heads, D head size.
"""

from typing import Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from tuneloop.errors import UserError

IMPLEMENTATION = "tuneloop"


class AttentionContext(Protocol):
    """Computes attention over the packed tokens of one forward pass."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, /
    ) -> torch.Tensor:
        """Output (T, H, D) of query (T, H, D), key and value (T, K, D); keys already carry their rotary positions."""
        ...


def refuse_unsupported(sliding_window: int | None = None, softcap: float | None = None, sink: object = None) -> None:
    """Raise a `UserError` for attention that the contexts do not compute."""
    if sliding_window is not None or softcap is not None or sink is not None:
        raise UserError("this model uses sliding-window, soft-capped or sink attention, which is not supported")


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    context: AttentionContext | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    refuse_unsupported(sliding_window, softcap, s_aux)
    if context is None:
        raise UserError("this model's layers do not hand on to their attention what it is called with: not supported")
    out_THD = context.attend(
        module.layer_idx,  # type: ignore[arg-type]  # every transformers attention module has its index
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        scaling,
    )
    return out_THD.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, _attention)
