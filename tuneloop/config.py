"""Strict configuration: TOML in, one frozen pydantic model out, resolved JSON and a digest beside the outputs.

This module imports neither torch nor kfp, so that help and validation stay fast.
"""

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tuneloop.errors import UserError


class StrictModel(BaseModel):
    """Base of every config section: unknown keys are errors, values are not coerced, instances are frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


Model = TypeVar("Model", bound=StrictModel)


def load_config(cls: type[Model], path: str | Path, overrides: Iterable[str] = ()) -> Model:
    """Read a TOML (or resolved JSON) file, apply `section.key=value` overrides, and validate.

    Raises:
        UserError: the file is missing or not TOML/JSON, an override is malformed, or a value is refused.
    """
    return parse_config(cls, apply_overrides(read_config_file(path), overrides), origin=_origin(path))


def read_config_file(path: str | Path) -> dict[str, Any]:
    """The raw mapping of a `.toml` or `.json` file, which may be an s3:// URI; or of JSON text, which begins with "{".

    Raises:
        UserError: missing, unreadable, or not a mapping.
        TryAgain: an object store is unavailable.
    """
    if _is_json_text(path):
        kind, text = "json", str(path)
    else:
        kind, text = str(path).rpartition(".")[2], _read_text(path)
    try:
        data = json.loads(text) if kind == "json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{_origin(path)}: not valid {'JSON' if kind == 'json' else 'TOML'}: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a table of settings, found {type(data).__name__}")
    return data


def _is_json_text(path: str | Path) -> bool:
    return str(path).lstrip().startswith("{")


def _origin(path: str | Path) -> str:
    """What messages call the config."""
    return "config" if _is_json_text(path) else str(path)


def _read_text(path: str | Path) -> str:
    try:
        if str(path).startswith("s3://"):
            from tuneloop.storage import read_file

            return read_file(str(path)).decode("utf-8-sig")
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `data` with each `a.b.c=value` set; values are TOML, and a bare word is a string.

    Raises:
        UserError: no `=`, or the path runs through something that is not a table.
    """
    merged = json.loads(json.dumps(data, default=str))
    for override in overrides:
        dotted, equals, raw = override.partition("=")
        keys = [key.strip() for key in dotted.split(".")]
        if not equals or not all(keys):
            raise UserError(f"--set {override!r}: write it as section.key=value")
        table = merged
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {override!r}: {key!r} is a value, not a section")
        table[keys[-1]] = _parse_value(raw.strip())
    return merged


def _parse_value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        return raw


def parse_config(cls: type[Model], data: dict[str, Any], origin: str) -> Model:
    """Validate a raw mapping; every refusal is one line that names the key, the value and the bound.

    Raises:
        UserError: with the first problem, and the count of the others.
    """
    try:
        # JSON mode lets strict validation accept what TOML and JSON can express (lists for tuples).
        return cls.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        problems = [_describe(cls, item) for item in error.errors()]
    more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
    raise UserError(f"{origin}: {problems[0]}{more}")


def _describe(cls: type[BaseModel], item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    where = ".".join(location) or "config"
    if item["type"] == "extra_forbidden":
        known = list(_field_names_at(cls, item["loc"][:-1]))
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}"
        return f"{where}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{where}: required, but not given"
    message = item["msg"].removeprefix("Value error, ")
    shown = json.dumps(item["input"], default=str)
    return f"{where}: {message}" + (f" (got {shown})" if len(shown) <= 80 else "")


def _field_names_at(cls: type[BaseModel], location: tuple[Any, ...]) -> Iterator[str]:
    """Names of the fields of the model(s) that sit at a validation error's location."""
    models: list[type[BaseModel]] = [cls]
    for part in location:
        if not isinstance(part, str):
            continue  # a list index: the element's model is already in `models`
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        nested = [model for field in fields for model in _models_in(field.annotation)]
        models = nested or models  # a union's tag is no field: stay where we are
    for model in models:
        yield from model.model_fields


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def resolved_json(config: StrictModel) -> str:
    """The config with every default filled in, as indented JSON that `load_config` reads back."""
    return json.dumps(config.model_dump(mode="json"), indent=2, sort_keys=True) + "\n"


def config_digest(config: StrictModel) -> str:
    """sha256 (hex) of the resolved config, independent of key order and of how defaults were written."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
