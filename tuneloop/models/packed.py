"""Prompts and their completions, packed without padding, the prompt of a group computed once.

The packed row holds all prompts, then all completions. A completion's tokens see their own prompt and their own
earlier tokens, nothing else, so the G completions of a prompt share one copy of it in every layer. The last token of
a completion predicts nothing and is not fed.

Legend: N prompts, G completions a prompt (the most), B completions, P longest prompt, C longest completion input,
T packed tokens, H query heads, K key/value heads, D head size, S scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tuneloop.models.attention_pieces import Piece, pieces
from tuneloop.models.grouped_attention import GroupedAttention

Group = tuple[Sequence[int], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class PackedBatch:
    """Token ids with the indices that unpack them; build one by `pack`.

    Attributes:
        input_ids_T: packed tokens, prompts first.
        position_ids_T: each token's place in its own sequence.
        prompt_index_NP: packed row of each prompt token (T where padded); prompt_length_N tells which are real.
        fed_index_NGC: packed row of each fed completion token (T where padded); fed_length_NG tells which are real.
        completion_of_S: which completion each scored token belongs to; scored tokens are in completion order.
        row_S: packed row whose output predicts each scored token.
        target_S: the scored tokens.
    """

    input_ids_T: torch.Tensor
    position_ids_T: torch.Tensor
    prompt_index_NP: torch.Tensor
    prompt_length_N: torch.Tensor
    fed_index_NGC: torch.Tensor
    fed_length_NG: torch.Tensor
    prompt_tokens: int
    completions: int
    completion_of_S: torch.Tensor
    row_S: torch.Tensor
    target_S: torch.Tensor
    _pieces: dict[tuple[int, int, torch.dtype], list[Piece]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shared_S(self) -> torch.Tensor:
        """Which scored tokens are predicted by a prompt's last row; all completions of a group share it."""
        return self.row_S < self.prompt_tokens

    def pieces(self, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Piece]:
        """How attention is cut; every layer's, forward and backward, is cut alike."""
        key = heads, kv_heads, dtype
        if key not in self._pieces:
            self._pieces[key] = pieces(
                self.prompt_index_NP, self.prompt_length_N, self.fed_index_NGC, self.fed_length_NG,
                heads=heads, kv_heads=kv_heads, dtype=dtype,
            )  # fmt: skip
        return self._pieces[key]

    def attend(
        self, layer: int, query_THD: torch.Tensor, key_TKD: torch.Tensor, value_TKD: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Block-diagonal causal attention with shared prompts; see `AttentionContext`."""
        return GroupedAttention.apply(query_THD, key_TKD, value_TKD, self, scaling)


def pack(groups: Sequence[Group], device: torch.device | str = "cpu") -> PackedBatch:
    """Pack (prompt, completions) groups.

    Args:
        groups: token ids of each prompt and of its completions, at least one group.

    Raises:
        ValueError: a prompt or a completion has no tokens.
    """
    prompts = [list(prompt) for prompt, _ in groups]
    completions = [list(completion) for _, members in groups for completion in members]
    if not all(prompts) or not all(completions):
        raise ValueError("a prompt or a completion without tokens cannot be packed")
    prompt_length_N = torch.tensor([len(prompt) for prompt in prompts])
    widest = max(len(members) for _, members in groups)
    fed_length_NG = torch.tensor(
        [[len(completion) - 1 for completion in members] + [0] * (widest - len(members)) for _, members in groups],
        dtype=torch.long,
    ).view(len(groups), widest)
    prompt_tokens = int(prompt_length_N.sum())
    prompt_start_N = prompt_length_N.cumsum(0) - prompt_length_N
    fed_flat = fed_length_NG.flatten()
    fed_start_NG = (prompt_tokens + fed_flat.cumsum(0) - fed_flat).view_as(fed_length_NG)
    fed_end = prompt_tokens + int(fed_flat.sum())
    place_P = torch.arange(int(prompt_length_N.max()))
    place_C = torch.arange(int(fed_length_NG.max()) if widest else 0)
    prompt_ok_NP = place_P < prompt_length_N[:, None]
    fed_ok_NGC = place_C < fed_length_NG[..., None]
    fed_index_NGC = torch.where(fed_ok_NGC, fed_start_NG[..., None] + place_C, fed_end)
    fed_position_NGC = (prompt_length_N[:, None, None] + place_C).expand_as(fed_index_NGC)
    tokens = [token for prompt in prompts for token in prompt]
    tokens += [token for completion in completions for token in completion[:-1]]
    real_NG = torch.arange(widest) < torch.tensor([len(members) for _, members in groups])[:, None]
    last_row_NG1 = (prompt_start_N + prompt_length_N - 1)[:, None, None].expand(-1, widest, 1)
    rows = torch.cat([last_row_NG1, fed_index_NGC], dim=2)
    scored = torch.cat([real_NG[..., None], fed_ok_NGC], dim=2)
    lengths_B = torch.tensor([len(completion) for completion in completions], dtype=torch.long)
    return PackedBatch(
        input_ids_T=torch.tensor(tokens).to(device),
        position_ids_T=torch.cat([place_P.expand_as(prompt_ok_NP)[prompt_ok_NP], fed_position_NGC[fed_ok_NGC]]).to(
            device
        ),
        prompt_index_NP=torch.where(prompt_ok_NP, prompt_start_N[:, None] + place_P, fed_end).to(device),
        prompt_length_N=prompt_length_N.to(device),
        fed_index_NGC=fed_index_NGC.to(device),
        fed_length_NG=fed_length_NG.to(device),
        prompt_tokens=prompt_tokens,
        completions=len(completions),
        completion_of_S=torch.repeat_interleave(torch.arange(len(completions)), lengths_B).to(device),
        row_S=rows[scored].to(device),
        target_S=torch.tensor([token for completion in completions for token in completion], dtype=torch.long).to(
            device
        ),
    )
