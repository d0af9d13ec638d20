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
        """Make room for `length` tokens a completion; room doubles, so copying stays cheap."""
        room = self.own_keys[0].shape[3] if self.own_keys else 0
        if length <= room:
            return
        room = max(length, 2 * room, 16)
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
        self.cache, self.row_A, self.sample_A, self.place_A = cache, row_A, sample_A, place_A
        self.length = int(place_A.max()) + 1
        cache.reserve(self.length)
        future_NC = torch.arange(self.length, device=place_N.device) > place_N[:, None]
        self.future = future_NC[:, None, None, None, :] if bool(future_NC.any()) else None

    def attend(self, layer, query_AHD, key_AKD, value_AKD, scaling):
        """See `AttentionContext`; the packed rows are the active sequences."""
        own_keys, own_values = self.cache.own_keys[layer], self.cache.own_values[layer]
        own_keys[self.row_A, :, self.sample_A, self.place_A] = key_AKD
        own_values[self.row_A, :, self.sample_A, self.place_A] = value_AKD
        n, k, g, _, d = own_keys.shape
        query = query_AHD.new_zeros(n, g, query_AHD.shape[1], d)
        query[self.row_A, self.sample_A] = query_AHD
        query = query.view(n, g, k, -1, d).transpose(1, 2)
        prompt_keys, own_keys = self.cache.prompt_keys[layer], own_keys[..., : self.length, :]
        scores = products(query, prompt_keys, own_keys).mul_(scaling)
        if self.cache.padding is not None:
            scores[..., : self.cache.padding.shape[-1]].masked_fill_(self.cache.padding, float("-inf"))
        if self.future is not None:
            scores[..., prompt_keys.shape[2] :].masked_fill_(self.future, float("-inf"))
        weights = scores.softmax(-1).to(query.dtype)
        out = combine(weights, self.cache.prompt_values[layer], own_values[..., : self.length, :])
        return out.transpose(1, 2).reshape(n, g, -1, d)[self.row_A, self.sample_A]


def products(left, prompt, own):
    """left @ [prompt; own]^T in fp32, shape (n, K, G, M, P + C)."""
    n, k, g, m, d = left.shape
    scores = (left.reshape(n * k * g, m, d) @ own.reshape(n * k * g, -1, d).transpose(1, 2)).view(n, k, g, m, -1)
    shared = (left.reshape(n * k, g * m, d) @ prompt.flatten(0, 1).transpose(1, 2)).view(n, k, g, m, -1)
    return torch.cat([shared, scores], dim=-1).float()


def combine(weights, prompt, own):
    """weights @ [prompt; own], shape (n, K, G, M, D)."""
    n, k, g, m, _ = weights.shape
    split = prompt.shape[2]
    out = weights[..., split:].reshape(n * k * g, m, -1) @ own.reshape(n * k * g, -1, own.shape[-1])
    shared = weights[..., :split].reshape(n * k, g * m, split) @ prompt.flatten(0, 1)
    return out.add_(shared.view_as(out)).view(n, k, g, m, -1)
