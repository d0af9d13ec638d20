"""Drawing tokens from logits with given random numbers.

Legend: R rows of logits, A draws, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F

from tuneloop.settings import SamplingSettings

_BLOCK = 256  # the inverse of the cumulative distribution is searched block first, so no cumsum over V is made
_SMALLEST_BLOCK = 64  # that divides V; if none does, V is padded, which copies all weights
_CHUNK_ELEMENTS = 1 << 22


def draw(
    logits_RV: torch.Tensor, row_A: torch.Tensor, uniform_A: torch.Tensor, sampling: SamplingSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for every (row, uniform number) by inversion of the cumulative distribution.

    Args:
        logits_RV: unscaled logits.
        row_A: which row each draw uses; sorted ascending.
        uniform_A: float64 in [0, 1), ignored when greedy.

    Returns:
        tokens (A,) int64, and their log-probs (A,) at the temperature (1 when greedy), before top-k and top-p.
    """
    size = max(1, _CHUNK_ELEMENTS // logits_RV.shape[1])
    tokens, logprobs = [], []
    for first in range(0, logits_RV.shape[0], size):
        chunk = logits_RV[first : first + size]
        mine = (row_A >= first) & (row_A < first + size)
        token, logprob = _draw_chunk(chunk, row_A[mine] - first, uniform_A[mine], sampling)
        tokens.append(token)
        logprobs.append(logprob)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw_chunk(logits_RV, row_A, uniform_A, sampling):
    if sampling.temperature not in (0.0, 1.0):
        logits_RV = logits_RV.float() / sampling.temperature
    weights_RV = logits_RV.softmax(-1, dtype=torch.float32)
    if sampling.temperature == 0.0:
        token_A = logits_RV.argmax(-1)[row_A]
    else:
        chosen_from_RV = weights_RV
        if sampling.top_k or sampling.top_p < 1.0:
            chosen_from_RV = _truncated(weights_RV, sampling)
        token_A = _invert(chosen_from_RV, row_A, uniform_A)
    return token_A, weights_RV[row_A, token_A].log()


def _invert(weights_RV: torch.Tensor, row_A: torch.Tensor, uniform_A: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative weight exceeds uniform * total."""
    size = math.gcd(weights_RV.shape[1], _BLOCK)
    if size < _SMALLEST_BLOCK:
        size, weights_RV = _BLOCK, F.pad(weights_RV, (0, -weights_RV.shape[1] % _BLOCK))
    blocks_RKB = weights_RV.view(weights_RV.shape[0], -1, size)
    cumulative_RK = blocks_RKB.sum(-1).double().cumsum(-1)
    goal_A1 = (uniform_A.to(cumulative_RK.device) * cumulative_RK[row_A, -1])[:, None]
    block_A1 = torch.searchsorted(cumulative_RK[row_A], goal_A1, right=True).clamp_(max=cumulative_RK.shape[1] - 1)
    before_A1 = torch.where(block_A1 > 0, cumulative_RK[row_A].gather(1, (block_A1 - 1).clamp(min=0)), 0.0)
    inside_AB = blocks_RKB[row_A, block_A1.squeeze(1)]
    cumulative_AB = inside_AB.double().cumsum(-1)
    place_A1 = torch.searchsorted(cumulative_AB, goal_A1 - before_A1, right=True)
    # Rounding can put the goal past the block's last weight: then its last token with any weight is meant.
    last_A1 = (torch.arange(size, device=inside_AB.device) * (inside_AB > 0)).amax(-1, keepdim=True)
    return (block_A1 * size + torch.minimum(place_A1, last_A1)).squeeze(1)


def _truncated(weights_RV: torch.Tensor, sampling: SamplingSettings) -> torch.Tensor:
    """Zero all but the top_k largest weights, then all past the smallest set that holds top_p of the mass."""
    ordered_RV, order_RV = weights_RV.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered_RV[:, sampling.top_k :] = 0.0
    if sampling.top_p < 1.0:
        mass_before_RV = ordered_RV.cumsum(-1) - ordered_RV
        ordered_RV[mass_before_RV >= sampling.top_p * ordered_RV.sum(-1, keepdim=True)] = 0.0
    return torch.zeros_like(weights_RV).scatter_(1, order_RV, ordered_RV)
