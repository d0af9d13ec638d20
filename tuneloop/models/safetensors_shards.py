"""Safetensors files read and written in pieces, so that neither a model nor a tensor is ever whole in memory.

A file is an 8-byte little-endian length, a JSON header that maps tensor names to dtype, shape and byte range, and the
bytes (https://github.com/huggingface/safetensors#format). The header follows from the shapes alone, so a file can be
written before its last tensor is known.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from tuneloop.errors import UserError
from tuneloop.models.sources import INDEX, WEIGHTS, weight_files

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
FLOAT_DTYPES = ("F32", "F16", "BF16")
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of a tensor: its name, dtype (safetensors' spelling) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        return TORCH_DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> int:
        return self.elements * self.item_bytes


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its spec, the file, and where in the file its bytes begin."""

    spec: TensorSpec
    file: Path
    offset: int


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of a model folder, in the order in which the files hold them.

    Raises:
        UserError: a file is missing, cut off or damaged, or two files hold the same tensor.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for tensor in read_header(file):
            if tensor.spec.name in found:
                raise UserError(f"{file}: {tensor.spec.name} is also in {found[tensor.spec.name].file.name}; "
                                "fetch the model again")  # fmt: skip
            found[tensor.spec.name] = tensor
    return list(found.values())


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes; the file's size is checked.

    Raises:
        UserError: the file is missing, cut off or damaged.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = []
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            spec = TensorSpec(name, entry["dtype"], tuple(entry["shape"]))
            begin, end = entry["data_offsets"]
            if end - begin != spec.bytes or begin != (tensors[-1].offset + tensors[-1].spec.bytes - 8 - length
                                                      if tensors else 0):  # fmt: skip
                raise ValueError(f"{name} does not have the bytes that its shape needs")
            tensors.append(StoredTensor(spec, file, 8 + length + begin))
        end = tensors[-1].offset + tensors[-1].spec.bytes if tensors else 8 + length
        if end != size:
            raise ValueError(f"{size} bytes instead of {end}")
    except FileNotFoundError:
        raise UserError(f"{file}: missing; fetch the model again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged or cut off ({error}); fetch the model again") from None
    return tensors


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Split tensors, in order, into shards of at most `max_shard_bytes`; a larger tensor gets a shard of its own."""
    shards: list[list[TensorSpec]] = []
    filled = 0
    for spec in specs:
        if not shards or filled + spec.bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.bytes
    return shards


class ShardWriter:
    """Writes one safetensors file, pieces in any order and from any thread.

    Args:
        file: the file to make.
        specs: its tensors.
    """

    def __init__(self, file: Path, specs: Iterable[TensorSpec]):
        # Wide items first, as the library writes them: every tensor then begins at a multiple of its item size.
        ordered = sorted(specs, key=lambda spec: -spec.item_bytes)
        header = _header(ordered)
        self._offsets: dict[str, int] = {}
        self._end = len(header)
        for spec in ordered:
            self._offsets[spec.name] = self._end
            self._end += spec.bytes
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self._write_at(0, memoryview(header))

    def write(self, spec: TensorSpec, start: int, values: torch.Tensor) -> None:
        """Write a piece of a tensor: `values`, in its dtype, from element `start` on."""
        data = values.contiguous().view(-1).view(torch.uint8).numpy().data
        self._write_at(self._offsets[spec.name] + start * spec.item_bytes, data)

    def finish(self) -> None:
        """Bring the file to the disk; every piece must have been written."""
        assert os.fstat(self._descriptor).st_size == self._end, "a piece was not written"
        os.fsync(self._descriptor)
        self.close()

    def close(self) -> None:
        """Give the file up as it is."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def _write_at(self, offset: int, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, offset)
            data, offset = data[written:], offset + written


def read_elements(tensor: StoredTensor, start: int, count: int) -> torch.Tensor:
    """`count` elements of a stored tensor from element `start` on, flat.

    Raises:
        UserError: the file has become shorter since its header was read.
    """
    values = torch.empty(count, dtype=TORCH_DTYPES[tensor.spec.dtype])
    data = values.view(torch.uint8).numpy().data
    offset, filled = tensor.offset + start * tensor.spec.item_bytes, 0
    with tensor.file.open("rb", buffering=0) as file:
        while filled < len(data):
            got = os.preadv(file.fileno(), [data[filled:]], offset + filled)
            if got == 0:
                raise UserError(f"{tensor.file}: became shorter while it was read")
            filled += got
    return values


def _header(specs: Iterable[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.bytes],
        }
        offset += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_names(count: int) -> list[str]:
    """File names as transformers expects them: one plain name, or numbered ones."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, shards: list[list[TensorSpec]]) -> None:
    """Write `model.safetensors.index.json` when there is more than one shard."""
    if len(shards) == 1:
        return
    pairs = list(zip(shard_names(len(shards)), shards, strict=True))
    index = {
        "metadata": {
            "total_size": sum(spec.bytes for shard in shards for spec in shard),
            "total_parameters": sum(spec.elements for shard in shards for spec in shard),
        },
        "weight_map": dict(sorted((spec.name, name) for name, shard in pairs for spec in shard)),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
