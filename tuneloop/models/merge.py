"""Folding a LoRA adapter into its base model, piece by piece: memory does not grow with the model.

Every target weight W becomes round(W + scaling * B @ A): the product and the sum are computed in fp32 and rounded once
to the output's dtype, to bfloat16 without bias (`rounding.py`). The bits are those that the rollout engine samples
from. All other tensors are copied as they are.

Shapes: A (_R, in), B (out, _R), W (out, in), or (in, out) where the layer is stored transposed.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from threading import Lock
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from tuneloop.errors import UserError
from tuneloop.files import fsync
from tuneloop.models.adapter_files import CONFIG_NAME
from tuneloop.models.adapter_io import Adapter, load_adapter
from tuneloop.models.model_card import ModelCard
from tuneloop.models.rounding import PERIOD, round_unbiased
from tuneloop.models.safetensors_shards import (
    FLOAT_DTYPES,
    TORCH_DTYPES,
    ShardWriter,
    StoredTensor,
    TensorSpec,
    plan_shards,
    read_elements,
    shard_names,
    stored_tensors,
    write_index,
)
from tuneloop.models.sources import INDEX, check_model_folder
from tuneloop.models.targets import match_pattern
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
        _write_shards(merger, partial, shards)
        result = merger.result(specs, shards)
        write_index(partial, shards)
        _copy_companions(base, partial)
        if dtype != "base":
            config.pop("torch_dtype", None)
            (partial / "config.json").write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
        ModelCard(str(base), result.adapter_digest).write(partial, base)
        fsync(partial)
        os.replace(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return result


class _Piece(NamedTuple):
    """Consecutive elements of an output tensor."""

    spec: TensorSpec
    start: int
    length: int


class _Merger:
    """Computes pieces of output tensors, from several threads, and knows which modules it has merged."""

    def __init__(self, adapter: Adapter, stored: dict[str, StoredTensor], targets: dict[str, str]):
        self._adapter, self._stored, self._targets = adapter, stored, targets
        self._elements = dict.fromkeys(adapter.factors, 0)  # merged so far, by module
        self._changed = 0
        self._lock = Lock()

    def pieces(self, spec: TensorSpec) -> Iterator[_Piece]:
        """The pieces of a tensor; of a target whole rows, as many as the rollout engine sums at once."""
        columns = spec.shape[1] if spec.name in self._targets else 1
        size = max(1, PERIOD // columns) * columns
        for start in range(0, spec.elements, size):
            yield _Piece(spec, start, min(size, spec.elements - start))

    def write(self, piece: _Piece, writer: ShardWriter) -> None:
        """Compute a piece (merge, convert or copy) and write it."""
        spec, start, length = piece
        values = read_elements(self._stored[spec.name], start, length)
        module = self._targets.get(spec.name)
        if module is not None:
            values = self._merged(module, values, piece)
        elif values.dtype != TORCH_DTYPES[spec.dtype]:
            values = _in_range(values, spec).to(TORCH_DTYPES[spec.dtype])
        writer.write(spec, start, values)

    def _merged(self, module: str, values: torch.Tensor, piece: _Piece) -> torch.Tensor:
        a, b = (factor.to(torch.float32) for factor in self._adapter.factors[module])
        left, right = (a.T, b.T) if self._adapter.config.get("fan_in_fan_out") else (b, a)
        columns = right.shape[1]
        rows = slice(piece.start // columns, (piece.start + piece.length) // columns)
        before = values.to(TORCH_DTYPES[piece.spec.dtype])  # a wider base is rounded first, as loading it does
        weight = before.view(-1, columns).float()
        total = torch.addmm(weight, left[rows], right, alpha=self._adapter.scaling(module))
        merged = round_unbiased(_in_range(total, piece.spec), before.dtype, piece.start).view(-1)
        bits = torch.int16 if before.itemsize == 2 else torch.int32
        changed = np.count_nonzero(merged.view(bits).numpy() != before.view(bits).numpy())
        with self._lock:
            self._changed += changed
            self._elements[module] += piece.length
        return merged

    def result(self, specs: list[TensorSpec], shards: list[list[TensorSpec]]) -> MergeResult:
        """The finished merge, once it is sure that every module of the adapter is in it, once, and did something."""
        merged = [spec for spec in specs if spec.name in self._targets]
        sizes = {self._targets[spec.name]: spec.elements for spec in merged}
        assert self._elements == sizes, "a module was left out or merged twice"
        dtypes = {_DTYPE_NAMES[spec.dtype] for spec in merged}
        if not self._changed:
            raise UserError(f"the adapter's whole update is lost in rounding to {', '.join(sorted(dtypes))}; "
                            "set merge_adapter.dtype to float32, or train longer")  # fmt: skip
        return MergeResult(
            adapter_digest=self._adapter.digest(),
            dtype="+".join(sorted(dtypes)),
            shards=len(shards),
            bytes=sum(spec.bytes for spec in specs),
            merged_modules=len(sizes),
            changed_share=self._changed / sum(sizes.values()),
        )


def _write_shards(merger: _Merger, folder: Path, shards: list[list[TensorSpec]]) -> None:
    """Write every shard, pieces side by side; a full shard goes to the disk while the next one is computed."""
    writers: list[ShardWriter] = []
    flushes: list[Future[None]] = []
    try:
        with (
            Progress("merge", sum(map(len, shards))) as progress,
            _one_thread_each() as workers,
            ThreadPoolExecutor(workers) as pool,
        ):
            for name, shard in zip(shard_names(len(shards)), shards, strict=True):
                writers.append(ShardWriter(folder / name, shard))
                pieces = [piece for spec in shard for piece in merger.pieces(spec)]
                for _ in pool.map(merger.write, pieces, repeat(writers[-1])):
                    pass
                flushes.append(pool.submit(writers[-1].finish))
                progress.advance(len(shard))
            for flush in flushes:
                flush.result()
    finally:
        for writer in writers:
            writer.close()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[int]:
    """The number of workers to start. Inside, torch computes on the calling thread alone: pieces run side by side, and
    threads that wait for each other at every operation of a piece would cost more than they give."""
    workers = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield workers
    finally:
        torch.set_num_threads(workers)


def _in_range(values: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """`values` themselves.

    Raises:
        UserError: the output is float16, and a value lies beyond its range.
    """
    if spec.dtype == "F16" and values.abs().max() > _LARGEST_FLOAT16:
        raise UserError(f"{spec.name}: has values beyond float16's range; set merge_adapter.dtype to bfloat16")
    return values


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
