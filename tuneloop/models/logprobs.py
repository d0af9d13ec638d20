"""Log-probabilities of given tokens without ever holding all logits.

Legend: S scored tokens, R rows of hidden states, V vocabulary, D hidden size.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 22  # logits held at once where a row has several targets, or the head is trained
ROWS = 512  # otherwise: rows whose probabilities are held at once, in the model's dtype
BLOCK = 2048  # tokens of the vocabulary whose logits a CPU makes at a time


@dataclass(frozen=True)
class TokenScores:
    """Log-probs of the scored tokens (with gradient) and the entropy of their distributions (without), in nats."""

    logprobs_S: torch.Tensor
    entropy_S: torch.Tensor


def token_scores(
    hidden_TD: torch.Tensor,
    head_VD: torch.Tensor,
    row_S: torch.Tensor,
    target_S: torch.Tensor,
    *,
    temperature: float = 1.0,
    shared_rows: torch.Tensor | None = None,
) -> TokenScores:
    """log softmax(hidden[row] @ head.T / temperature)[target] for every scored token.

    With a frozen head, each row is multiplied by the head twice in all (logits forward, and the gradient of the
    log-prob with respect to the hidden state, which is ready in the forward pass because it enters the backward pass
    only times a scalar a token); nothing is recomputed.

    Args:
        hidden_TD: packed last hidden states.
        head_VD: output head weight.
        row_S, target_S: which row predicts which token.
        shared_rows: boolean (S,), True where several tokens are predicted from one row; None: no row is shared.
    """
    if head_VD.requires_grad or (shared_rows is None and not hidden_TD.requires_grad):
        return TokenScores(*_chunked(hidden_TD, head_VD, row_S, target_S, temperature))
    if shared_rows is None or not bool(shared_rows.any()):
        return TokenScores(*_FrozenHeadScores.apply(hidden_TD[row_S], head_VD, target_S, temperature))
    own = ~shared_rows
    logprobs_S = torch.empty(row_S.numel(), device=hidden_TD.device)
    entropy_S = torch.empty_like(logprobs_S)
    shared = _chunked(hidden_TD, head_VD, row_S[shared_rows], target_S[shared_rows], temperature)
    single = _FrozenHeadScores.apply(hidden_TD[row_S[own]], head_VD, target_S[own], temperature)
    logprobs_S = logprobs_S.masked_scatter(shared_rows, shared[0]).masked_scatter(own, single[0])
    entropy_S = entropy_S.masked_scatter(shared_rows, shared[1]).masked_scatter(own, single[1])
    return TokenScores(logprobs_S, entropy_S)


def _rows_per_chunk(vocabulary: int) -> int:
    return max(1, CHUNK_ELEMENTS // vocabulary)


def _chunked(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, row_S: torch.Tensor, target_S: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain autograd over chunks of distinct rows, logits recomputed in the backward pass."""
    rows_R, place_S = torch.unique(row_S, return_inverse=True)
    order_S = torch.argsort(place_S, stable=True)
    counts_R = torch.bincount(place_S, minlength=rows_R.numel())
    size = _rows_per_chunk(head_VD.shape[0])
    logprobs, entropies = [], []
    start = 0
    for first in range(0, rows_R.numel(), size):
        counts = counts_R[first : first + size]
        members = order_S[start : start + int(counts.sum())]
        start += members.numel()
        hidden_RD = hidden_TD[rows_R[first : first + size]]
        arguments = (hidden_RD, head_VD, place_S[members] - first, target_S[members], temperature)
        if torch.is_grad_enabled():
            scores = checkpoint(_chunk_scores, *arguments, use_reentrant=False)
        else:
            scores = _chunk_scores(*arguments)
        logprobs.append(scores[0])
        entropies.append(scores[1])
    restore = torch.empty_like(order_S)
    restore[order_S] = torch.arange(order_S.numel(), device=order_S.device)
    if not logprobs:
        empty = hidden_TD.new_zeros(0, dtype=torch.float32)
        return empty, empty
    return torch.cat(logprobs)[restore], torch.cat(entropies)[restore]


def _chunk_scores(
    hidden_RD: torch.Tensor, head_VD: torch.Tensor, place_S: torch.Tensor, target_S: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logits_RV = F.linear(hidden_RD, head_VD).float() / temperature
    normaliser_R = logits_RV.logsumexp(-1)
    with torch.no_grad():
        expected_R = (logits_RV * (logits_RV - normaliser_R[:, None]).exp()).sum(-1)
        entropy_R = normaliser_R - expected_R
    return logits_RV[place_S, target_S] - normaliser_R[place_S], entropy_R[place_S]


class _FrozenHeadScores(torch.autograd.Function):
    """One target a row, frozen head: d logp/d hidden = (onehot - softmax) @ head / temperature, made in forward."""

    @staticmethod
    def forward(ctx, hidden_SD, head_VD, target_S, temperature):
        wants_direction = ctx.needs_input_grad[0]
        logprobs_S = torch.empty(target_S.numel(), device=hidden_SD.device)
        entropy_S = torch.empty_like(logprobs_S)
        direction_SD = torch.empty_like(hidden_SD) if wants_direction else None
        for first in range(0, target_S.numel(), ROWS):
            piece = slice(first, first + ROWS)
            blocks = _VocabularyBlocks(hidden_SD[piece], head_VD, target_S[piece], temperature, wants_direction)
            logprobs_S[piece] = blocks.logprobs_R
            if direction_SD is None:
                entropy_S[piece] = blocks.entropies()
            else:
                direction_SD[piece], entropy_S[piece] = blocks.directions()
        ctx.save_for_backward(direction_SD)
        ctx.mark_non_differentiable(entropy_S)
        return logprobs_S, entropy_S

    @staticmethod
    def backward(ctx, gradient_S, _):  # type: ignore[override]
        (direction_SD,) = ctx.saved_tensors
        return (direction_SD * gradient_S[:, None]).to(direction_SD.dtype), None, None, None


class _VocabularyBlocks:
    """softmax(hidden @ head.T / temperature) of some rows, a block of the vocabulary at a time.

    A block's logits stay in the processor's cache while they are normalised, and its products have the shape that is
    computed fastest. Each block is normalised by itself; `share_RK` is what it weighs in the whole distribution.

    Legend: B tokens of a block, K blocks.
    """

    def __init__(self, hidden_RD, head_VD, target_R, temperature: float, keep: bool):
        self.hidden_RD, self.head_VD, self.target_R, self.temperature = hidden_RD, head_VD, target_R, temperature
        self.size = BLOCK if hidden_RD.device.type == "cpu" else head_VD.shape[0]
        self.weights: list[torch.Tensor] = []  # a block: (R, B), the target's own left out
        chosen_R = torch.empty(target_R.numel(), device=hidden_RD.device)
        normalisers, expected = [], []
        for start in range(0, head_VD.shape[0], self.size):
            logits_RB = hidden_RD @ self._head(start).T
            if temperature != 1.0:
                logits_RB = logits_RB.float().div_(temperature)
            log_weights_RB = torch.log_softmax(logits_RB, -1, dtype=torch.float32)
            row_I = ((target_R >= start) & (target_R < start + logits_RB.shape[1])).nonzero().squeeze(1)
            place_I = target_R[row_I] - start
            chosen_R[row_I] = logits_RB[row_I, place_I].float()
            normalisers.append(logits_RB[:, 0].float() - log_weights_RB[:, 0])
            weights_RB = log_weights_RB.exp_()
            if keep:
                weights_RB = weights_RB.to(head_VD.dtype)
                weights_RB[row_I, place_I] = 0.0
                self.weights.append(weights_RB)
            else:
                expected.append(torch.linalg.vecdot(weights_RB, logits_RB.float()))
        normalisers_RK = torch.stack(normalisers, 1)
        self.normaliser_R = normalisers_RK.logsumexp(1)
        self.share_RK = (normalisers_RK - self.normaliser_R[:, None]).exp_()
        self.logprobs_R = chosen_R - self.normaliser_R
        self._expected = expected

    def _head(self, start: int) -> torch.Tensor:
        return self.head_VD[start : start + self.size]

    def entropies(self) -> torch.Tensor:
        """Normaliser less expected logit, (R,)."""
        return self.normaliser_R - torch.linalg.vecdot(self.share_RK, torch.stack(self._expected, 1))

    def directions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """d log-prob/d hidden, (R, D) in fp32, and the entropies."""
        # p - 1 of the target itself is added in fp32: neither is it rounded, nor does 1 - (1 - p) lose its digits.
        residual_RD = torch.expm1(self.logprobs_R)[:, None] * self.head_VD[self.target_R].float()
        for number, weights_RB in enumerate(self.weights):
            mixed_RD = weights_RB @ self._head(number * self.size)
            residual_RD.addcmul_(mixed_RD.float(), self.share_RK[:, number, None])
        direction_RD = residual_RD.neg_().div_(self.temperature)
        # hidden . direction is the target's logit less the expected one.
        entropy_R = torch.linalg.vecdot(direction_RD, self.hidden_RD.float()) - self.logprobs_R
        return direction_RD, entropy_R
