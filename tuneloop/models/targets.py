"""Which modules get an adapter, decided by their names alone. This module does not import torch."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from tuneloop.errors import UserError
from tuneloop.settings import LoraSettings

ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "query_key_value", "dense")
MLP_NAMES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")


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
    try:
        chosen = names if wanted == "all-linear" else _matching(names, wanted)
        excluded = dict.fromkeys(settings.exclude_modules, True)
        chosen = [name for name in chosen if not match_pattern(excluded, name, False)]
    except re.error as error:
        raise UserError(f"lora.target_modules or lora.exclude_modules: {error.pattern!r} is no regular expression "
                        f"({error})") from None  # fmt: skip
    if not chosen:
        without = f" without {', '.join(settings.exclude_modules)}" if settings.exclude_modules else ""
        raise UserError(f"lora.target_modules = {wanted!r}{without} matches no linear layer; known: {_known(names)}")
    return chosen


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
