"""Leaving a fully fine-tuned model as a folder that every later step can use as a base."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def save_full_model(model: PreTrainedModel, base: Path, folder: Path) -> None:
    """Write the model's weights and config, and the base's tokenizer files beside them."""
    model.save_pretrained(folder)
    for path in base.iterdir():
        is_weights = path.suffix in WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
