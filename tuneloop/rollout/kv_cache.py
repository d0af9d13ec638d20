"""Keys and values of groups in generation: one copy of each prompt's, and each completion's own.

Legend: N prompts, G samples a prompt, P longest prompt, C longest completion so far, A active sequences,
H query heads, K key/value heads, D head size.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from tuneloop.models.packed import PackedBatch


@dataclass
class GroupCache:
    """Caches of all layers. `prefill(batch)` and `decode(...)` give the attention contexts that fill them."""

    samples: int
    prompt_keys: list[torch.Tensor] = field(default_factory=list)  # a layer: (N, K, P, D)
    prompt_values: list[torch.Tensor] = field(default_factory=list)
    own_keys: list[torch.Tensor] = field(default_factory=list)  # a layer: (N, K, G, room, D)
    own_values: list[torch.Tensor] = field(default_factory=list)
    padding: torch.Tensor | None = None  # (N, 1, 1, 1, P), True where a prompt has ended

    def keep(self, prompts: torch.Tensor) -> None:
        """Forget all prompts but these (indices into N)."""
        for store in (self.prompt_keys, self.prompt_values, self.own_keys, self.own_values):
            store[:] = [tensor[prompts] for tensor in store]
        if self.padding is not None:
            self.padding = self.padding[prompts]

    def join(self, other: "GroupCache") -> None:
        """Take in the groups of another cache, behind this one's; theirs have no tokens of their own yet."""
        longest = max(cache.prompt_keys[0].shape[2] for cache in (self, other))
        self._pad_prompts(longest)
        other._pad_prompts(longest)
        if self.own_keys:
            other.reserve(self.own_keys[0].shape[3])
        stores = ("prompt_keys", "prompt_values", "own_keys", "own_values")
        for mine, theirs in ((getattr(self, name), getattr(other, name)) for name in stores):
            mine[:] = [torch.cat(pair) for pair in zip(mine, theirs, strict=True)]
        if self.padding is not None and other.padding is not None:
            self.padding = torch.cat([self.padding, other.padding])

    def _pad_prompts(self, length: int) -> None:
        n, _, own_length, _ = self.prompt_keys[0].shape
        if self.padding is None:
            self.padding = torch.zeros(n, 1, 1, 1, own_length, dtype=torch.bool, device=self.prompt_keys[0].device)
        self.padding = F.pad(self.padding, (0, length - own_length), value=True)
        for store in (self.prompt_keys, self.prompt_values):
            store[:] = [F.pad(tensor, (0, 0, 0, length - own_length)) for tensor in store]

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens a completion; room grows by a quarter, so copying stays cheap."""
        room = self.own_keys[0].shape[3] if self.own_keys else 0
        if length <= room:
            return
        room = -(-max(length, room + room // 4) // 16) * 16
        for store in (self.own_keys, self.own_values):
            for layer, prompt in enumerate(self.prompt_keys):
                n, k, _, d = prompt.shape
                grown = prompt.new_zeros(n, k, self.samples, room, d)
                if layer < len(store):
                    grown[..., : store[layer].shape[3], :] = store[layer]
                    store[layer] = grown
                else:
                    store.append(grown)


class Prefill:
    """Attention of the prompts, kept in the cache."""

    def __init__(self, cache: GroupCache, batch: PackedBatch):
        self.cache, self.batch = cache, batch
        places = torch.arange(batch.prompt_index_NP.shape[1], device=batch.prompt_length_N.device)
        padding_NP = places >= batch.prompt_length_N[:, None]
        cache.padding = padding_NP[:, None, None, None, :] if bool(padding_NP.any()) else None

    def attend(self, layer, query_THD, key_TKD, value_TKD, scaling):
        """See `AttentionContext`."""
        index = self.batch.prompt_index_NP.clamp(max=key_TKD.shape[0] - 1)  # what padding holds is hidden in decoding
        self.cache.prompt_keys.append(key_TKD[index].transpose(1, 2).contiguous())
        self.cache.prompt_values.append(value_TKD[index].transpose(1, 2).contiguous())
        return self.batch.attend(layer, query_THD, key_TKD, value_TKD, scaling)


class Decode:
    """Attention of one new token of every active sequence, over its prompt and its own tokens.

    Args:
        row_A, sample_A: which group in the cache, and which of its samples, each sequence is.
        place_A: the place of the new token among the completion's.
        place_N: the same for each group in the cache.
    """

    def __init__(
        self,
        cache: GroupCache,
        row_A: torch.Tensor,
        sample_A: torch.Tensor,
        place_A: torch.Tensor,
        place_N: torch.Tensor,
    ):
        cache.reserve(int(place_A.max()) + 1)
        self.cache = cache
        _, k, g, room, _ = cache.own_keys[0].shape
        heads_K = torch.arange(k, device=row_A.device)
        slot_AK = (row_A[:, None] * k + heads_K) * g + sample_A[:, None]
        self.slot = slot_AK.flatten()  # of each sequence's heads among the (n, K, G) that the cache has room for
        self.place = (slot_AK * room + place_A[:, None]).flatten()  # of the new token in the cache of own keys
        self.hidden = self._hidden(place_N, room, cache.own_keys[0].dtype)
        self.query: torch.Tensor | None = None  # (n·K·G, M·D); what is not active stays zero

    def _hidden(self, place_N: torch.Tensor, room: int, dtype: torch.dtype) -> torch.Tensor:
        """Added to scores, (n, 1, 1, P + room): -inf for a prompt's padding and for what is not generated yet."""
        length = self.cache.prompt_keys[0].shape[2]
        hidden = torch.zeros(place_N.numel(), length + room, dtype=dtype, device=place_N.device)
        if self.cache.padding is not None:
            hidden[:, :length].masked_fill_(self.cache.padding.view(-1, length), float("-inf"))
        future_NC = torch.arange(room, device=place_N.device) > place_N[:, None]
        hidden[:, length:].masked_fill_(future_NC, float("-inf"))
        return hidden[:, None, None]

    def attend(self, layer, query_AHD, key_AKD, value_AKD, scaling):
        """See `AttentionContext`; the packed rows are the active sequences."""
        own_keys, own_values = self.cache.own_keys[layer], self.cache.own_values[layer]
        n, k, g, room, d = own_keys.shape
        own_keys.view(-1, d).index_copy_(0, self.place, key_AKD.reshape(-1, d))
        own_values.view(-1, d).index_copy_(0, self.place, value_AKD.reshape(-1, d))
        grouped = (query_AHD * scaling).reshape(self.slot.numel(), -1)
        slots = grouped.new_zeros(n * k * g, grouped.shape[1]) if self.query is None else self.query
        self.query = slots.index_copy_(0, self.slot, grouped)
        query = slots.view(n * k, -1, d)
        # The whole room is multiplied: a part of it would have to be copied first.
        prompt_keys, prompt_values = self.cache.prompt_keys[layer], self.cache.prompt_values[layer]
        shared = query @ prompt_keys.flatten(0, 1).transpose(1, 2)
        # Keys on the left: what stands there need not be packed first.
        own = (own_keys.view(-1, room, d) @ query.view(n * k * g, -1, d).transpose(1, 2)).transpose(1, 2)
        scores = torch.cat([shared, own.reshape(n * k, -1, room)], dim=-1).view(n, k, query.shape[1], -1)
        weights = scores.add_(self.hidden).softmax(-1, dtype=torch.float32).to(scores.dtype).flatten(0, 1)
        length = prompt_keys.shape[2]
        out = weights[..., :length] @ prompt_values.flatten(0, 1)
        own_weights = weights[..., length:].reshape(n * k * g, -1, room)
        out += (own_weights @ own_values.view(-1, room, d)).view_as(out)
        return out.view(slots.shape).index_select(0, self.slot).view(query_AHD.shape)
