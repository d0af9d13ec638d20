"""Which modules get an adapter, decided by their names alone. This module does not import torch."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tuneloop.errors import UserError
from tuneloop.settings import LoraSettings

ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "query_key_value", "dense")
MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")

_EMBEDDINGS = ("embed_tokens", "embed_positions", "wte", "wpe", "word_embeddings", "embedding")
_HEADS = ("lm_head", "embed_out", "output_head")


def linear_layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in) of the linear layers among a model's stored tensors, embeddings and head left out."""
    found = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module != name and len(shape) == 2 and module.rsplit(".", 1)[-1] not in (*_EMBEDDINGS, *_HEADS):
            found[module] = (shape[0], shape[1])
    return found


def match_pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a pattern is a regex for the end of the module name, on a dot boundary."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def choose_targets(linear: Iterable[str], settings: LoraSettings) -> list[str]:
    """The names, of a model's linear layers without its output head, that get an adapter; in the given order.

    "all-linear" is every one; "attention" and "mlp" are the projections of those blocks; a tuple holds module names,
    their suffixes, or regular expressions for the end of a name.

    Raises:
        UserError: nothing matches, or a pattern of the list matches nothing or is no regular expression.
    """
    names, wanted = list(linear), settings.target_modules
    _require_regular_expressions(settings)
    chosen = names if wanted == "all-linear" else _matching(names, wanted)
    _require_matches("lora.exclude_modules", settings.exclude_modules, names)
    excluded = dict.fromkeys(settings.exclude_modules, True)
    chosen = [name for name in chosen if not match_pattern(excluded, name, False)]
    if not chosen:
        without = f" without {', '.join(settings.exclude_modules)}" if settings.exclude_modules else ""
        raise UserError(f"lora.target_modules = {wanted!r}{without} matches no linear layer; known: {_known(names)}")
    _require_matches("lora.rank_pattern", settings.rank_pattern, chosen)
    _require_matches("lora.alpha_pattern", settings.alpha_pattern, chosen)
    return chosen


def _require_regular_expressions(settings: LoraSettings) -> None:
    listed = () if isinstance(settings.target_modules, str) else settings.target_modules
    sections = {
        "target_modules": listed,
        "exclude_modules": settings.exclude_modules,
        "rank_pattern": settings.rank_pattern,
        "alpha_pattern": settings.alpha_pattern,
    }
    for section, patterns in sections.items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"lora.{section}: {pattern!r} is no regular expression ({error})") from None


def _require_matches(section: str, patterns: Iterable[str], names: list[str]) -> None:
    for pattern in patterns:
        if not any(match_pattern({pattern: True}, name, False) for name in names):
            raise UserError(f"{section}: {pattern!r} matches no adapted linear layer; known: {_known(names)}")


def _matching(names: list[str], wanted: str | tuple[str, ...]) -> list[str]:
    blocks = {"attention": ATTENTION_NAMES, "mlp": MLP_NAMES}
    patterns = blocks[wanted] if isinstance(wanted, str) else wanted
    matched = {pattern: [name for name in names if match_pattern({pattern: True}, name, False)] for pattern in patterns}
    unmatched = [pattern for pattern in patterns if not matched[pattern]]
    if unmatched and not isinstance(wanted, str):
        raise UserError(f"lora.target_modules: {unmatched[0]!r} matches no linear layer; known: {_known(names)}")
    found = {name for pattern in patterns for name in matched[pattern]}
    return [name for name in names if name in found]


def _known(names: list[str]) -> str:
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
