"""Folding a LoRA adapter into its base model, piece by piece: memory does not grow with the model.

Every target weight W becomes round(W + scaling * B @ A): the product and the sum are computed in fp32 and rounded once
to the output's dtype, to bfloat16 without bias (`rounding.py`). The bits are those that the rollout engine samples
from. All other tensors are copied as they are.

Shapes: A (_R, in), B (out, _R), W (out, in), or (in, out) where the layer is stored transposed.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from tuneloop.errors import UserError
from tuneloop.models.adapter_io import CONFIG_NAME, Adapter, load_adapter, match_pattern
from tuneloop.models.model_card import ModelCard
from tuneloop.models.rounding import PERIOD, round_unbiased
from tuneloop.models.safetensors_shards import (
    FLOAT_DTYPES,
    TORCH_DTYPES,
    ShardWriter,
    StoredTensor,
    TensorReader,
    TensorSpec,
    plan_shards,
    shard_names,
    stored_tensors,
    write_index,
)
from tuneloop.models.sources import INDEX, check_model_folder
from tuneloop.progress import Progress

MergeDtype = Literal["base", "bfloat16", "float16", "float32"]
_STORED_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_DTYPE_NAMES = {stored: name for name, stored in _STORED_NAMES.items()}
_LARGEST_FLOAT16 = 65504.0
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
# What PEFT can put into an adapter beside A and B: key of its config -> the value that means "not there".
_UNSUPPORTED = {
    "use_dora": False,
    "modules_to_save": None,
    "bias": "none",
    "lora_bias": False,
    "trainable_token_indices": None,
    "target_parameters": None,
    "layer_replication": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
}
# These initialisations also change the base's weights, so that A and B are relative to another base.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class MergeResult:
    """What a merge made.

    Attributes:
        adapter_digest: of the adapter that was merged.
        dtype: of the merged weights.
        shards: number of safetensors files.
        bytes: of all tensors.
        merged_modules: number of modules that were changed, each exactly once.
        changed_share: the share of the target weights that differ from the base's after rounding.
    """

    adapter_digest: str
    dtype: str
    shards: int
    bytes: int
    merged_modules: int
    changed_share: float


def merge_adapter(
    base: Path, adapter: Path, output: Path, *, max_shard_bytes: int = 2_000_000_000, dtype: MergeDtype = "base"
) -> MergeResult:
    """Write `output`, a model folder in Hugging Face format: the base with the adapter folded in.

    Args:
        base: a model folder.
        adapter: a LoRA adapter in PEFT's format, trained on this base.
        output: the folder to make; it appears complete or not at all.
        max_shard_bytes: the largest safetensors file, unless one tensor alone is larger.
        dtype: of the floating-point weights; "base" keeps each tensor's own.

    Raises:
        UserError: the adapter is a no-op, is for another base, or holds more than LoRA factors of linear layers; a
            file is damaged; the base is quantised; the output exists, or the disk has no room for it.
    """
    if output.exists():
        raise UserError(f"{output}: already exists; choose another output or remove it")
    config = _read_base_config(check_model_folder(base))
    loaded = _read_adapter(adapter, config)
    tensors = stored_tensors(base)
    targets = _match_targets(loaded, tensors, base)
    specs = [_output_spec(tensor.spec, dtype) for tensor in tensors]
    shards = plan_shards(specs, max_shard_bytes)
    _check_room(output, sum(spec.bytes for spec in specs))
    merger = _Merger(loaded, {tensor.spec.name: tensor for tensor in tensors}, targets)
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with Progress("merge", len(specs)) as progress, TensorReader() as reader:
            for name, shard in zip(shard_names(len(shards)), shards, strict=True):
                with ShardWriter(partial / name, shard) as writer:
                    for spec in writer.order:
                        merger.write(spec, reader, writer)
                        progress.advance()
        result = merger.result(specs, shards)
        write_index(partial, shards)
        _copy_companions(base, partial)
        if dtype != "base":
            config.pop("torch_dtype", None)
            (partial / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
        ModelCard(str(base), result.adapter_digest).write(partial, base)
        _fsync_folder(partial)
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return result


class _Merger:
    """Writes tensors one by one, and knows which modules it has merged."""

    def __init__(self, adapter: Adapter, stored: dict[str, StoredTensor], targets: dict[str, str]):
        self._adapter, self._stored, self._targets = adapter, stored, targets
        self._merged: list[str] = []
        self._changed = self._elements = 0

    def write(self, spec: TensorSpec, reader: TensorReader, writer: ShardWriter) -> None:
        """Append the output tensor `spec`: merged, converted or copied."""
        stored = self._stored[spec.name]
        module = self._targets.get(spec.name)
        if module is not None:
            self._write_merged(module, stored, spec, reader, writer)
        elif stored.spec.dtype == spec.dtype:
            writer.copy(stored)
        else:
            for start in range(0, spec.elements, PERIOD):
                piece = reader.read(stored, start, min(PERIOD, spec.elements - start))
                writer.write(_bytes_of(_in_range(piece, spec).to(TORCH_DTYPES[spec.dtype])))

    def _write_merged(
        self, module: str, stored: StoredTensor, spec: TensorSpec, reader: TensorReader, writer: ShardWriter
    ) -> None:
        a, b = (factor.to(torch.float32) for factor in self._adapter.factors[module])
        left, right = (a.T, b.T) if self._adapter.config.get("fan_in_fan_out") else (b, a)
        scaling, columns = self._adapter.scaling(module), right.shape[1]
        rows = max(1, PERIOD // columns)  # the engine's pieces, so that sums are taken in the same order
        for start in range(0, left.shape[0], rows):
            part = left[start : start + rows]
            weight = reader.read(stored, start * columns, part.shape[0] * columns).view(part.shape[0], columns)
            before = weight.to(TORCH_DTYPES[spec.dtype])  # a wider base is rounded first, as loading it does
            total = torch.addmm(before.float(), part, right, alpha=scaling)
            merged = round_unbiased(_in_range(total, spec), before.dtype, start * columns)
            self._changed += int((merged != before).sum())
            writer.write(_bytes_of(merged))
        self._elements += spec.elements
        self._merged.append(module)

    def result(self, specs: list[TensorSpec], shards: list[list[TensorSpec]]) -> MergeResult:
        """The finished merge, once it is sure that every module of the adapter is in it, once, and did something."""
        assert sorted(self._merged) == sorted(self._adapter.factors), "a module was left out or merged twice"
        dtypes = {_DTYPE_NAMES[spec.dtype] for spec in specs if spec.name in self._targets}
        if not self._changed:
            raise UserError(f"the adapter's whole update is lost in rounding to {', '.join(sorted(dtypes))}; "
                            "set merge_adapter.dtype to float32, or train longer")  # fmt: skip
        return MergeResult(
            adapter_digest=self._adapter.digest(),
            dtype="+".join(sorted(dtypes)),
            shards=len(shards),
            bytes=sum(spec.bytes for spec in specs),
            merged_modules=len(self._merged),
            changed_share=self._changed / self._elements,
        )


def _in_range(values: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """`values` themselves.

    Raises:
        UserError: the output is float16, and a value lies beyond its range.
    """
    if spec.dtype == "F16" and values.abs().max() > _LARGEST_FLOAT16:
        raise UserError(f"{spec.name}: has values beyond float16's range; set merge_adapter.dtype to bfloat16")
    return values


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _output_spec(spec: TensorSpec, dtype: MergeDtype) -> TensorSpec:
    if dtype == "base" or spec.dtype not in FLOAT_DTYPES:
        return spec
    return TensorSpec(spec.name, _STORED_NAMES[dtype], spec.shape)


def _read_base_config(base: Path) -> dict[str, Any]:
    try:
        config = json.loads((base / "config.json").read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{base}: config.json is damaged; fetch the model again") from None
    if config.get("quantization_config"):
        raise UserError(f"{base}: a quantised base cannot take an adapter exactly; name the unquantised model")
    return config


def _read_adapter(folder: Path, base_config: dict[str, Any]) -> Adapter:
    """The adapter, known to be one that a merge reproduces in full.

    Raises:
        UserError: it is a no-op, is damaged, or changes more than the weights of linear layers.
    """
    if (folder / CONFIG_NAME).is_file():
        _refuse_unsupported(folder)
    adapter = load_adapter(folder)
    for module, factors in adapter.factors.items():
        rank = match_pattern(adapter.config.get("rank_pattern"), module, adapter.config.get("r"))
        if any(factor.dim() != 2 for factor in factors) or {factors[0].shape[0], factors[1].shape[1]} != {rank}:
            raise UserError(f"{folder}: the factors of {module} do not have the configured rank {rank}; "
                            "the adapter is damaged, restore it")  # fmt: skip
        if not all(bool(factor.isfinite().all()) for factor in factors):
            raise UserError(f"{folder}: the factors of {module} are not finite; the training diverged")
        if base_config.get("tie_word_embeddings") and module.rpartition(".")[2] in ("lm_head", "embed_tokens", "wte"):
            raise UserError(f"{folder}: changes {module}, which this base ties to its other end of the vocabulary; "
                            "add it to lora.exclude_modules and train again")  # fmt: skip
    if adapter.is_no_op():
        raise UserError(f"{folder}: the adapter changes nothing (every B·A is zero); was it trained and saved?")
    return adapter


def _refuse_unsupported(folder: Path) -> None:
    try:
        config = json.loads((folder / CONFIG_NAME).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return  # load_adapter says so
    for key, absent in _UNSUPPORTED.items():
        if config.get(key) and config[key] != absent:
            raise UserError(f"{folder}: an adapter with {key} = {config[key]!r} cannot be merged; "
                            "train with plain LoRA factors only")  # fmt: skip
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_CHANGE_THE_BASE):
        raise UserError(f"{folder}: init_lora_weights = {start!r} also changed the base; convert the adapter to a "
                        "plain one with PEFT, or train with init_lora_weights = true")  # fmt: skip


def _match_targets(adapter: Adapter, tensors: list[StoredTensor], base: Path) -> dict[str, str]:
    """Name of the base's tensor -> module of the adapter.

    Raises:
        UserError: the base lacks a module, or has it in another shape or dtype.
    """
    stored = {tensor.spec.name: tensor.spec for tensor in tensors}
    targets = {}
    for module, (a, b) in adapter.factors.items():
        spec = stored.get(f"{module}.weight")
        if spec is None:
            raise UserError(f"{base}: has no {module}, so the adapter was trained on another base; name that one")
        shape = (b.shape[0], a.shape[1])
        expected = shape[::-1] if adapter.config.get("fan_in_fan_out") else shape
        if spec.shape != expected:
            raise UserError(f"{base}: {module} has shape {list(spec.shape)}, but the adapter was trained on "
                            f"{list(expected)}; name the adapter's own base")  # fmt: skip
        if spec.dtype not in FLOAT_DTYPES:
            raise UserError(f"{base}: {module} is stored as {spec.dtype}; name a model in bfloat16, float16 or float32")
        targets[spec.name] = module
    return targets


def _check_room(output: Path, needed: int) -> None:
    existing = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(f"{output}: needs {needed / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB left; free space")


def _copy_companions(base: Path, output: Path) -> None:
    """Everything that is not weights: config, tokenizer, chat template, generation config, licence."""
    for source in sorted(base.iterdir()):
        if source.name.startswith(".") or source.name in (INDEX, "README.md") or source.suffix in _NOT_COPIED:
            continue
        if source.is_file():
            shutil.copyfile(source, output / source.name)
        elif source.name == "additional_chat_templates":
            shutil.copytree(source, output / source.name)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
