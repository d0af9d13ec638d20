"""The forward pass over packed tokens, shared by training, scoring and sampling.

Legend: T packed tokens, D hidden size, V vocabulary.
"""

import torch
from transformers import PreTrainedModel

from tuneloop.models.attention import AttentionContext
from tuneloop.models.logprobs import TokenScores
from tuneloop.models.packed import PackedBatch
from tuneloop.models.sharding import TokenScorer, sharding_of


def hidden_states(
    model: PreTrainedModel, input_ids_T: torch.Tensor, position_ids_T: torch.Tensor, context: AttentionContext
) -> torch.Tensor:
    """Last hidden states (T, D), after the final norm."""
    decoder = getattr(model, model.base_model_prefix)
    output = decoder(input_ids=input_ids_T[None], position_ids=position_ids_T[None], use_cache=False, context=context)
    return output.last_hidden_state[0]


def head_weight(model: PreTrainedModel) -> torch.Tensor:
    """The output head's weight (V, D)."""
    return model.get_output_embeddings().weight  # type: ignore[return-value,union-attr]


def score(model: PreTrainedModel, batch: PackedBatch, temperature: float = 1.0) -> TokenScores:
    """Log-probs and entropies of every scored token of the batch."""
    return score_with_hidden(model, batch, temperature)[0]


def score_with_hidden(
    model: PreTrainedModel, batch: PackedBatch, temperature: float = 1.0
) -> tuple[TokenScores, torch.Tensor]:
    """`score`, and the last hidden states (T, D) that it was made from."""
    sharding = sharding_of(model)
    if sharding is None:
        return _score(model, batch, temperature, TokenScorer(model.get_output_embeddings()))
    return sharding.run(lambda: _score(model, batch, temperature, sharding.scorer))


def _score(
    model: PreTrainedModel, batch: PackedBatch, temperature: float, scorer: TokenScorer
) -> tuple[TokenScores, torch.Tensor]:
    hidden_TD = hidden_states(model, batch.input_ids_T, batch.position_ids_T, batch)
    scores = scorer(hidden_TD, batch.row_S, batch.target_S, temperature, batch.shared_S)
    return TokenScores(*scores), hidden_TD
