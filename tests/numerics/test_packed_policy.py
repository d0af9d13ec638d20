"""The packed forward and backward pass against plain transformers, one sequence at a time."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tuneloop.models import attention
from tuneloop.models.forward import score
from tuneloop.models.fused import fuse
from tuneloop.models.lora import attach
from tuneloop.models.lora_linear import LoraLinear
from tuneloop.models.packed import pack
from tuneloop.settings import LoraSettings

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False)),
}


def random_groups(seed: int) -> list[tuple[list[int], list[list[int]]]]:
    """Groups of unequal sizes and lengths, completions of a single token included."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    sizes = [3, 1, 4, 2]
    return [(tokens(1, 9), [tokens(1, 7) for _ in range(size)]) for size in sizes]


def adapted_model(name: str, seed: int = 0):
    torch.manual_seed(seed)
    model = ARCHITECTURES[name]()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    model.requires_grad_(False)
    layers = attach(model, LoraSettings(rank=4, alpha=8.0), seed)
    for layer in layers.values():
        layer.B.data.normal_(std=0.1)
    return model, layers


def plain_logprobs(model, groups) -> torch.Tensor:
    """Every completion alone with its prompt, through transformers' own eager attention."""
    model.set_attn_implementation("eager")
    pieces = []
    for prompt, completions in groups:
        for completion in completions:
            logits = model(torch.tensor([prompt + completion])).logits[0]
            logprobs = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
            pieces.append(logprobs.gather(1, torch.tensor(completion)[:, None]).squeeze(1))
    model.set_attn_implementation(attention.IMPLEMENTATION)
    return torch.cat(pieces)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_logprobs_and_gradients_equal_one_sequence_at_a_time(name: str, seed: int):
    model, layers = adapted_model(name)
    groups = random_groups(seed)
    weights = torch.randn(sum(len(c) for _, g in groups for c in g), generator=torch.Generator().manual_seed(seed))

    packed = score(model, pack(groups)).logprobs_S
    (packed * weights).sum().backward()
    ours = gradients(layers)
    plain = plain_logprobs(model, groups)
    (plain * weights).sum().backward()
    theirs = gradients(layers)

    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)
    for module in theirs:
        for mine, reference in zip(ours[module], theirs[module], strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-4)


def gradients(layers: dict[str, LoraLinear]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    taken = {name: (layer.A.grad.clone(), layer.B.grad.clone()) for name, layer in layers.items()}
    for layer in layers.values():
        layer.A.grad = layer.B.grad = None
    return taken


def test_a_completion_is_scored_the_same_whatever_it_is_packed_with():
    model, _ = adapted_model("qwen2")
    groups = random_groups(7)
    together = score(model, pack(groups)).logprobs_S
    alone = torch.cat([score(model, pack([(p, [c])])).logprobs_S for p, g in groups for c in g])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_only_the_adapter_gets_a_gradient():
    model, layers = adapted_model("llama")
    score(model, pack(random_groups(3))).logprobs_S.sum().backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {f"{name}.{factor}" for name in layers for factor in "AB"}
    assert with_gradient == expected


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_entropy_and_temperature_equal_the_full_softmax(temperature: float):
    model, _ = adapted_model("qwen2")
    groups = [([5, 6, 7], [[8, 9, 10]])]
    scores = score(model, pack(groups), temperature)
    model.set_attn_implementation("eager")
    logits = model(torch.tensor([[5, 6, 7, 8, 9, 10]])).logits[0, 2:5] / temperature
    distribution = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(scores.entropy_S, distribution.entropy(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.logprobs_S, distribution.log_prob(torch.tensor([8, 9, 10])), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_chunked_attention_and_head_equal_unchunked(rows: int, monkeypatch: pytest.MonkeyPatch):
    model, layers = adapted_model("llama")
    whole = score(model, pack(random_groups(4))).logprobs_S
    whole.sum().backward()
    reference = gradients(layers)
    monkeypatch.setattr("tuneloop.models.attention_pieces.CHUNK_ELEMENTS", 1)
    monkeypatch.setattr("tuneloop.models.attention_pieces._ROWS", rows)
    monkeypatch.setattr("tuneloop.models.logprobs.CHUNK_ELEMENTS", 1)
    batch = pack(random_groups(4))
    pieces = score(model, batch).logprobs_S
    cut = [piece for held in batch._pieces.values() for piece in held]
    assert max(piece.future.shape[0] for piece in cut) == rows
    pieces.sum().backward()
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=1e-5)
    for module, factors in gradients(layers).items():
        for mine, expected in zip(factors, reference[module], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_tokens_is_not_packed():
    for groups in ([([], [[1]])], [([1, 2], [[], [3, 4]]), ([5], [[6, 7]])]):
        with pytest.raises(ValueError, match="without tokens"):
            pack(groups)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_layers_equal_transformers_own(name: str):
    model, layers = adapted_model(name)
    batch = pack(random_groups(5))
    plain = score(model, batch).logprobs_S
    plain.sum().backward()
    expected = gradients(layers)
    fuse(model)
    assert "forward" in vars(model.model.norm), "the model's norms were not replaced"
    assert "forward" in vars(model.model.layers[0].mlp), "the model's gated activations were not replaced"
    fused = score(model, batch).logprobs_S
    fused.sum().backward()
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    for module, factors in gradients(layers).items():
        for mine, reference in zip(factors, expected[module], strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
