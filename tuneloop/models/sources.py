"""Where models come from: one URI in, one local folder in Hugging Face format out.

This module imports torch only when a model has to be converted or made.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from tuneloop.errors import TryAgain, UserError
from tuneloop.models.cache import cached_folder, default_cache_dir

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_PATTERNS = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "README.md"]


def resolve_model(uri: str, cache_dir: Path | None = None) -> Path:
    """The local folder (config.json, safetensors, tokenizer) that a model URI names, fetched or made if need be.

    Args:
        uri: a local folder or `file://` URI, `hf://org/name@revision`, `s3://bucket/prefix`,
            `bundled://smollm2-135m-instruct`, or `tiny://qwen2?seed=0`.
        cache_dir: where fetched and made models are kept; default `$TUNELOOP_CACHE` or `~/.cache/tuneloop`.

    Raises:
        UserError: an unknown scheme or name, or a folder that is no model; the message names what is missing.
        TryAgain: the network or the store is unavailable.
    """
    scheme, separator, _ = uri.partition("://")
    cache_dir = cache_dir or default_cache_dir()
    if not separator:
        return check_model_folder(_local_folder(uri, Path(uri)), uri)
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in sorted(_SCHEMES))
        raise UserError(f"{uri}: unknown kind of model; give a local folder or one of {known}")
    return check_model_folder(_SCHEMES[scheme](uri, cache_dir), uri)


def check_model_folder(folder: Path, uri: str | None = None) -> Path:
    """`folder` itself, once it is known to hold every file that a model needs.

    Raises:
        UserError: it does not; the message names the first missing file.
    """
    name = uri or str(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: not a model folder, config.json is missing")
    for file in weight_files(folder, name):
        if not file.is_file():
            raise UserError(f"{name}: {INDEX} names {file.name}, which is missing; fetch the model again")
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        raise UserError(f"{name}: the tokenizer is missing (no tokenizer.json); save it into the model's folder")
    return folder


def weight_files(folder: Path, name: str | None = None) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names.

    Raises:
        UserError: there are none, or the index is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
            return [folder / file for file in sorted(set(weight_map.values()))]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError):
            raise UserError(f"{name or folder}: {INDEX} is damaged; fetch the model again") from None
    pickled = next(folder.glob("pytorch_model*.bin"), None)
    hint = f"; {pickled.name} is a pickle, which is never loaded: convert the model to safetensors" if pickled else ""
    raise UserError(f"{name or folder}: not a model folder, {WEIGHTS} is missing{hint}")


def _local_folder(uri: str, path: Path) -> Path:
    if path.is_dir():
        return path.resolve()
    if path.exists():
        raise UserError(f"{uri}: a file; name the model's folder")
    hint = f", for a model of the Hugging Face hub write hf://{uri}" if uri.count("/") == 1 else ""
    raise UserError(f"{uri}: no such folder{hint}")


def _from_file(uri: str, cache_dir: Path) -> Path:
    from tuneloop.storage import local_path

    return _local_folder(uri, local_path(uri))


def _from_hub(uri: str, cache_dir: Path) -> Path:
    """A snapshot in the hub client's own cache, which other tools share."""
    repository, _, revision = uri.removeprefix("hf://").strip("/").partition("@")
    if repository.count("/") != 1:
        raise UserError(f"{uri}: write it as hf://organisation/name or hf://organisation/name@revision")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=_HUB_PATTERNS))
    except HFValidationError as error:
        raise UserError(f"{uri}: not a valid hub name ({error})") from None
    except GatedRepoError:
        raise UserError(f"{uri}: access is restricted; accept its terms on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise UserError(f"{uri}: no such model on the hub, or a private one: check the name and HF_TOKEN") from None
    except RevisionNotFoundError:
        raise UserError(f"{uri}: the model has no revision {revision!r}; name a branch, tag or commit") from None
    except LocalEntryNotFoundError as error:
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
            raise UserError(f"{uri}: not in the hub's cache and HF_HUB_OFFLINE is set: unset it once, "
                            "or name a local folder") from None  # fmt: skip
        raise TryAgain(f"{uri}: the hub cannot be reached and the model is not in its cache ({error})") from None
    except (HfHubHTTPError, ConnectionError, TimeoutError) as error:
        raise TryAgain(f"{uri}: the hub did not answer ({error})") from None


def _from_s3(uri: str, cache_dir: Path) -> Path:
    """A copy in the cache, named after what is stored: a model that was replaced in the bucket is fetched anew."""
    from tuneloop.progress import Progress
    from tuneloop.storage import NotFound, open_storage

    storage = open_storage(uri)
    versions = storage.versions()
    if not versions:
        raise NotFound(f"{uri}: holds no files; check the bucket and the prefix")

    def fetch(partial: Path) -> None:
        with Progress(f"fetching {uri}", len(versions)) as progress:
            storage.get_tree("", partial, on_file=lambda total: progress.advance())
        if storage.versions() != versions:
            raise TryAgain(f"{uri}: was changed while it was fetched; the same command may succeed now")

    digest = hashlib.sha256(json.dumps([uri.rstrip("/"), sorted(versions.items())]).encode()).hexdigest()
    return cached_folder(cache_dir / "s3" / digest[:32], fetch)


def _from_bundled(uri: str, cache_dir: Path) -> Path:
    from tuneloop.models.bundled import bundled_model

    return bundled_model(uri.removeprefix("bundled://"), cache_dir)


def _from_tiny(uri: str, cache_dir: Path) -> Path:
    from tuneloop.models.tiny import TinySettings, make_tiny_model

    parts = urlsplit(uri)
    settings = TinySettings.parse(parts.netloc + parts.path.rstrip("/"), parts.query)
    folder = cache_dir / "tiny" / f"{settings.family}-{settings.digest()[:16]}"
    return cached_folder(folder, lambda partial: make_tiny_model(settings, partial))


def _made_by_torch(source: Callable[[str, Path], Path]) -> Callable[[str, Path], Path]:
    """`source`, with a line for who asks for a model that is not made yet in the image of the steps without torch."""

    def resolve(uri: str, cache_dir: Path) -> Path:
        try:
            return source(uri, cache_dir)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise UserError(f"{uri}: is made by torch, which is not installed here; store the model's folder in a "
                            "bucket and name it as s3://bucket/prefix") from None  # fmt: skip

    return resolve


_SCHEMES: dict[str, Callable[[str, Path], Path]] = {
    "bundled": _made_by_torch(_from_bundled),
    "file": _from_file,
    "hf": _from_hub,
    "s3": _from_s3,
    "tiny": _made_by_torch(_from_tiny),
}
