"""Writing the splits: parquet in row groups, through temporary files in the same folder."""

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop.data.record import Row
from tuneloop.data.schema import MESSAGE_TYPE, SCHEMA, SPLITS

ROW_GROUP_ROWS = 8192
_ROW_GROUP_CHARACTERS = 1 << 25  # long prompts make smaller row groups, so that memory stays bounded


class SplitWriter:
    """Writes `<split>.parquet` for every split. Use as a context manager: on an error nothing is left.

    Args:
        folder: where the files go; they appear under their names when all are complete.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._files = {split: _SplitFile(folder / f".{split}.parquet.tmp") for split in SPLITS}

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for file in self._files.values():
            file.abandon()

    def add(self, split: str, row_id: str, row: Row, source: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Append a row to a split."""
        self._files[split].add(row_id, row, source, prompt_tokens, completion_tokens)

    def finish(self) -> None:
        """Complete the files and give them their names."""
        for file in self._files.values():
            file.close()
        for split, file in self._files.items():
            os.replace(file.path, self._folder / f"{split}.parquet")


class _SplitFile:
    """One file and the rows of its next row group."""

    def __init__(self, path: Path):
        self.path = path
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd", compression_level=1, use_dictionary=False)
        self._clear()

    def _clear(self) -> None:
        self._ids: list[str] = []
        self._rows: list[Row] = []
        self._sources: list[str] = []
        self._lengths: list[tuple[int, int]] = []
        self._characters = 0

    def add(self, row_id: str, row: Row, source: str, prompt_tokens: int, completion_tokens: int) -> None:
        self._ids.append(row_id)
        self._rows.append(row)
        self._sources.append(source)
        self._lengths.append((prompt_tokens, completion_tokens))
        self._characters += sum(map(len, row.contents)) + len(row.completion) + len(row.metadata)
        if len(self._rows) >= ROW_GROUP_ROWS or self._characters >= _ROW_GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_batch(_record_batch(self._ids, self._rows, self._sources, self._lengths))
            self._clear()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError, pa.ArrowException):  # a full disk: what is written goes away anyway
            self._writer.close()
        self.path.unlink(missing_ok=True)


def _record_batch(ids: list[str], rows: list[Row], sources: list[str], lengths: list[Any]) -> pa.RecordBatch:
    offsets, total = [0], 0
    for row in rows:
        total += len(row.roles)
        offsets.append(total)
    roles = pa.array([role for row in rows for role in row.roles], pa.string())
    contents = pa.array([text for row in rows for text in row.contents], pa.string())
    messages = pa.StructArray.from_arrays([roles, contents], fields=list(MESSAGE_TYPE))
    prompt_tokens, completion_tokens = zip(*lengths, strict=True)
    columns = [
        pa.array(ids, pa.string()),
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), messages, type=SCHEMA.field("messages").type),
        pa.array([row.answer for row in rows], pa.string()),
        pa.array([row.completion for row in rows], pa.string()),
        pa.array([row.reward_kind for row in rows], pa.string()),
        pa.array(sources, pa.string()),
        pa.array([row.metadata for row in rows], pa.string()),
        pa.array(prompt_tokens, pa.int32()),
        pa.array(completion_tokens, pa.int32()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)
