"""The forward pass over packed tokens, shared by training, scoring and sampling.

Legend: T packed tokens, D hidden size, V vocabulary.
"""

import torch
from transformers import PreTrainedModel

from tuneloop.models.attention import AttentionContext
from tuneloop.models.logprobs import TokenScores, token_scores
from tuneloop.models.packed import PackedBatch


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
    hidden_TD = hidden_states(model, batch.input_ids_T, batch.position_ids_T, batch)
    return token_scores(
        hidden_TD,
        head_weight(model),
        batch.row_S,
        batch.target_S,
        temperature=temperature,
        shared_rows=batch.shared_S,
    )
