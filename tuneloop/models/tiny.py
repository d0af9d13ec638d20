"""A tiny Qwen2 model with random weights and a byte-level tokenizer, made on the spot: for tests and dry runs."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from tuneloop.errors import UserError
from tuneloop.models.quiet import no_progress_bars

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_FORMAT = 1  # part of the cache's key: raise it when equal settings give another model
_FAMILIES = ("qwen2",)
_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class TinySettings:
    """What `tiny://<family>?option=value&…` may say."""

    family: str = "qwen2"
    seed: int = 0
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 128
    max_position: int = 512
    tied: int = 0  # 1: the output head is the embedding
    dtype: str = "float32"

    @classmethod
    def parse(cls, family: str, query: str) -> "TinySettings":
        """Read the URI's name and query.

        Raises:
            UserError: an unknown name or option, or a value out of bounds.
        """
        uri = f"tiny://{family}" + (f"?{query}" if query else "")
        if family not in _FAMILIES:
            raise UserError(f"{uri}: unknown architecture; known: {', '.join(_FAMILIES)}")
        options = [option.name for option in dataclasses.fields(cls) if option.name != "family"]
        values: dict[str, int | str] = {}
        for key, text in parse_qsl(query, keep_blank_values=True):
            if key not in options:
                raise UserError(f"{uri}: unknown option {key!r}; known: {', '.join(options)}")
            if key != "dtype" and not text.isdecimal():
                raise UserError(f"{uri}: {key} must be a whole number, not {text!r}")
            values[key] = text if key == "dtype" else int(text)
        settings = cls(family=family, **values)  # pyright: ignore[reportArgumentType]
        settings._check(uri)
        return settings

    def _check(self, uri: str) -> None:
        bounds = {"hidden_size": 4096, "layers": 64, "heads": 64, "kv_heads": 64, "intermediate_size": 16384}
        for name, largest in {**bounds, "max_position": 131072}.items():
            if not 1 <= getattr(self, name) <= largest:
                raise UserError(f"{uri}: {name} must be between 1 and {largest}")
        if self.hidden_size % (2 * self.heads):
            raise UserError(f"{uri}: hidden_size must be an even multiple of heads ({self.heads})")
        if self.heads % self.kv_heads:
            raise UserError(f"{uri}: heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.tied not in (0, 1) or self.seed >= 2**63:
            raise UserError(f"{uri}: tied must be 0 or 1, and seed less than 2^63")
        if self.dtype not in _DTYPES:
            raise UserError(f"{uri}: dtype must be one of {', '.join(_DTYPES)}")

    def digest(self) -> str:
        """sha256 (hex) of everything that decides the model's bits."""
        return hashlib.sha256(json.dumps([_FORMAT, dataclasses.astuple(self)]).encode()).hexdigest()


def make_tiny_model(settings: TinySettings, output: Path) -> None:
    """Write the model and its tokenizer in Hugging Face format; equal settings give equal bits."""
    import torch
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = byte_tokenizer()
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.max_position,
        tie_word_embeddings=bool(settings.tied),
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):  # construction draws random numbers: leave the caller's alone
        model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 2:
                # 1/sqrt(fan_in) keeps activations near unit variance at this width; Qwen2's 0.02 starves it.
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    model = model.to(getattr(torch, settings.dtype))
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    with no_progress_bars():
        model.save_pretrained(output)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=settings.max_position,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(output)


def byte_tokenizer() -> "Tokenizer":
    """One token a UTF-8 byte (so digits are single tokens) after the special tokens; no merges."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer
