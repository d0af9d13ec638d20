"""A model's dimensions from its config.json alone: the shape of every weight, and with them how many there are.

Families whose blocks are built alike: grouped-query attention with rotary positions, a gated perceptron, two norms.
This module imports neither torch nor transformers.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tuneloop.errors import UserError

PUBLISHED = Path(__file__).parent / "published"  # config.json of models that configs/ names, by the model's name

_QUERY_BIAS = {"qwen2"}  # families whose q, k and v projections always have a bias
_HEAD_NORMS = {"qwen3"}  # families that normalise every query and key head
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TINY_VOCABULARY = 259  # bytes and special tokens of `tuneloop.models.tiny`


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a decoder.

    Attributes:
        dtype: of the stored weights, as torch names it.
        query_bias, output_bias: of q, k and v projections, and of the attention's output projection.
        tied: the output head is the embedding.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    positions: int
    tied: bool
    dtype: str = "bfloat16"
    query_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every stored weight, as transformers names them."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self._block().items()}
        shapes["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocabulary, self.hidden)
        return shapes

    def _block(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden, self.intermediate
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        linear = {
            "self_attn.q_proj": (query, hidden, self.query_bias),
            "self_attn.k_proj": (key, hidden, self.query_bias),
            "self_attn.v_proj": (key, hidden, self.query_bias),
            "self_attn.o_proj": (hidden, query, self.output_bias),
            "mlp.gate_proj": (inner, hidden, self.mlp_bias),
            "mlp.up_proj": (inner, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, inner, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (out, into, bias) in linear.items():
            shapes[f"{name}.weight"] = (out, into)
            if bias:
                shapes[f"{name}.bias"] = (out,)
        if self.head_norms:
            shapes |= {f"self_attn.{name}_norm.weight": (self.head_size,) for name in "qk"}
        return shapes | {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}

    @property
    def parameters(self) -> int:
        """Stored weights; a head tied to the embedding counts once."""
        return sum(map(math.prod, self.tensors().values()))

    @property
    def layer_parameters(self) -> int:
        """Weights of one block."""
        return sum(map(math.prod, self._block().values()))

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys (or values) in one layer."""
        return self.kv_heads * self.head_size

    @property
    def query_width(self) -> int:
        """Elements of one token's queries in one layer."""
        return self.heads * self.head_size


def parse_shape(config: dict[str, Any], origin: str) -> ModelShape:
    """The dimensions that a config.json describes.

    Raises:
        UserError: a family that is not known, or a dimension that is missing.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{origin}: model_type {family!r} cannot be planned for; known: {', '.join(FAMILIES)}")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        attention_bias = bool(config.get("attention_bias", False))
        return ModelShape(
            family=family,
            layers=int(config["num_hidden_layers"]),
            hidden=hidden,
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or hidden // heads),
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            positions=int(config.get("max_position_embeddings") or 0),
            tied=bool(config.get("tie_word_embeddings", False)),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"),
            query_bias=family in _QUERY_BIAS or attention_bias,
            output_bias=family not in _QUERY_BIAS and attention_bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            head_norms=family in _HEAD_NORMS,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{origin}: has no usable {error}; give the model's own config.json") from None


def read_shape(file: Path) -> ModelShape:
    """The dimensions in a config.json.

    Raises:
        UserError: it cannot be read, or describes a model that cannot be planned for.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); name a model's config.json") from None
    if not isinstance(config, dict):
        raise UserError(f"{file}: is no JSON object; name a model's config.json")
    return parse_shape(config, str(file))


def find_shape(uri: str) -> ModelShape:
    """The dimensions of the model that a config names, without fetching its weights.

    Looked for in the model's folder, in the configs that come with this package, and in the hub client's cache.

    Raises:
        UserError: the config.json cannot be found here.
    """
    scheme, separator, rest = uri.partition("://")
    if scheme == "tiny" and separator:
        return _tiny(uri)
    published = PUBLISHED / (rest.partition("@")[0].rstrip("/").rpartition("/")[2].lower() + ".json")
    if scheme in ("hf", "bundled") and published.is_file():
        return read_shape(published)
    if scheme == "hf" and separator:
        return read_shape(_from_hub(uri, rest))
    folder = Path(urlsplit(uri).path if scheme == "file" else uri)
    if (separator and scheme != "file") or not (folder / "config.json").is_file():
        raise UserError(f"model.uri {uri}: its config.json is not here; name a copy with --model-config FILE")
    return read_shape(folder / "config.json")


def _from_hub(uri: str, rest: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    repository, _, revision = rest.strip("/").partition("@")
    try:
        return Path(hf_hub_download(repository, "config.json", revision=revision or None))
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"model.uri {uri}: its config.json is not in the hub's cache and cannot be fetched ({reason}); name a copy "
            "with --model-config FILE"
        ) from None


def _tiny(uri: str) -> ModelShape:
    from tuneloop.models.tiny import TinySettings

    parts = urlsplit(uri)
    tiny = TinySettings.parse(parts.netloc + parts.path.rstrip("/"), parts.query)
    return ModelShape(
        family=tiny.family,
        layers=tiny.layers,
        hidden=tiny.hidden_size,
        heads=tiny.heads,
        kv_heads=tiny.kv_heads,
        head_size=tiny.hidden_size // tiny.heads,
        intermediate=tiny.intermediate_size,
        vocabulary=TINY_VOCABULARY,
        positions=tiny.max_position,
        tied=bool(tiny.tied),
        dtype=tiny.dtype,
        query_bias=True,
    )
