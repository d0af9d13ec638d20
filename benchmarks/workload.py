"""The work of the decoding and GPU benchmarks: a model and prompts of one length, the same for every engine."""

import random
from pathlib import Path

# hidden, layers, heads, key/value heads, intermediate, vocabulary
SHAPES = {
    "tiny": (128, 2, 4, 2, 256, 512),
    "0.5b": (896, 24, 14, 2, 4864, 151_936),
    "1.5b": (1536, 28, 12, 2, 8960, 151_936),
    "7b": (3584, 28, 28, 4, 18_944, 152_064),
}


def model_folder(name: str, scratch: Path) -> Path:
    """A model URI resolved, or a model of a named shape with random weights.

    Random weights cost what trained ones cost, and need no download; the tokenizer has one token a byte.
    """
    if name not in SHAPES:
        from tuneloop.models.sources import resolve_model

        return resolve_model(name)
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from tuneloop.models.tiny import CHAT_TEMPLATE, byte_tokenizer

    folder = scratch / f"model-{name}"
    if folder.exists():
        return folder
    hidden, layers, heads, kv_heads, intermediate, vocab = SHAPES[name]
    tokenizer = byte_tokenizer()
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=hidden < 2048,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def random_prompts(count: int, length: int) -> list[list[int]]:
    """Token ids that every vocabulary here has, from a fixed seed."""
    draw = random.Random(0)
    return [[draw.randrange(10, 250) for _ in range(length)] for _ in range(count)]


def random_adapter(model, rank: int):
    """An adapter on all linear layers that changes the model a little, as a trained one does."""
    import torch

    from tuneloop.models.lora import attach, extract, peft_config
    from tuneloop.settings import LoraSettings

    settings = LoraSettings(rank=rank, alpha=float(rank))
    layers = attach(model, settings, 0)
    generator = torch.Generator().manual_seed(1)
    for layer in layers.values():
        with torch.no_grad():
            layer.B.copy_(0.01 * torch.randn(layer.B.shape, generator=generator).to(layer.B))
    return layers, extract(layers, peft_config(settings, layers, model, "base"))
