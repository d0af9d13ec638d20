"""Names, shapes and types of the tensors in a safetensors file, read from its header alone."""

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from tuneloop.errors import UserError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorHeader:
    """One tensor, without its values."""

    shape: tuple[int, ...]
    dtype: str  # as the format writes it: F32, BF16, …
    bytes: int


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a file: name -> shape, type and size.

    Layout: 8 bytes little-endian length, a JSON header of that length, the tensors.

    Raises:
        UserError: the file is damaged, or shorter than its header says.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        tensors = {
            name: TensorHeader(
                tuple(entry["shape"]), entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0]
            )
            for name, entry in entries.items()
        }
        expected = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file, or a damaged one ({error}); fetch the model again") from None
    if size < expected:
        raise UserError(f"{path}: cut off, {size:,} of {expected:,} bytes; fetch the model again")
    return tensors
