"""Where an existing adapter comes from: one URI in, one local folder in PEFT's format out. Does not import torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tuneloop.errors import TryAgain, UserError
from tuneloop.models.cache import cached_folder, default_cache_dir

CONFIG_NAME = "adapter_config.json"
REGISTRY = "registry:"


def resolve_adapter(
    uri: str, *, registry: str = "", adapter_name: str = "", base_uri: str = "", cache_dir: Path | None = None
) -> Path:
    """The local folder that an adapter's URI names, fetched if need be.

    Args:
        uri: a folder or `file://` URI (an adapter, or a step's output that holds `adapter/`), `s3://bucket/prefix`, or
            `registry:<alias>`.
        registry, adapter_name: where an alias is looked up.
        base_uri: the base that a registered adapter must have been trained on.
        cache_dir: where fetched adapters are kept; default `$TUNELOOP_CACHE` or `~/.cache/tuneloop`.

    Raises:
        UserError: nothing there, no adapter, or one for another base.
        TryAgain: the store is unavailable.
    """
    cache_dir = cache_dir or default_cache_dir()
    if uri.startswith(REGISTRY):
        folder = _from_registry(uri.removeprefix(REGISTRY), registry, adapter_name, base_uri, cache_dir)
    elif uri.startswith("s3://"):
        folder = _from_s3(uri, cache_dir)
    else:
        folder = _from_folder(uri)
    inner = folder / "adapter"
    folder = inner if inner.is_dir() and not (folder / CONFIG_NAME).is_file() else folder
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"lora.start_from {uri}: not an adapter, {CONFIG_NAME} is missing")
    return folder


def adapter_rank(folder: Path) -> int:
    """The rank that the adapter's config names; the largest when modules differ.

    Raises:
        UserError: the config is damaged.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_text())
        return max(int(config["r"]), *(config.get("rank_pattern") or {"": 0}).values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"lora.start_from {folder}: {CONFIG_NAME} is damaged; restore it or train again") from None


def _from_folder(uri: str) -> Path:
    from tuneloop.storage import local_path

    path = local_path(uri)
    if not path.is_dir():
        raise UserError(f"lora.start_from {uri}: no such folder")
    return path.resolve()


def _from_registry(alias: str, registry: str, adapter_name: str, base_uri: str, cache_dir: Path) -> Path:
    from tuneloop.registry import Registry

    version = Registry(registry).resolve(adapter_name, alias)
    if version is None:
        raise UserError(f"lora.start_from registry:{alias}: {registry} has no {adapter_name} under that alias; "
                        "promote one first, or start afresh")  # fmt: skip
    trained_on = version.record.get("base_uri")
    if base_uri and trained_on != base_uri:
        raise UserError(f"lora.start_from registry:{alias}: version {version.version} was trained on {trained_on}, "
                        f"not on model.uri = {base_uri}")  # fmt: skip
    name = hashlib.sha256(json.dumps([registry, adapter_name, version.version, version.record["files"]]).encode())

    def fetch(partial: Path) -> None:
        version.fetch_adapter(partial / "adapter")

    return cached_folder(cache_dir / "adapters" / name.hexdigest()[:32], fetch)


def _from_s3(uri: str, cache_dir: Path) -> Path:
    from tuneloop.storage import NotFound, open_storage

    storage = open_storage(uri)
    versions = storage.versions()
    if not versions:
        raise NotFound(f"lora.start_from {uri}: holds no files; check the bucket and the prefix")

    def fetch(partial: Path) -> None:
        storage.get_tree("", partial)
        if storage.versions() != versions:
            raise TryAgain(f"{uri}: was changed while it was fetched; the same command may succeed now")

    digest = hashlib.sha256(json.dumps([uri.rstrip("/"), sorted(versions.items())]).encode()).hexdigest()
    return cached_folder(cache_dir / "adapters" / digest[:32], fetch)
