"""Reading prepared data back: `train.parquet`, `validation.parquet`, `test.parquet`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop.data.schema import SCHEMA, Example, Message, schema_problem
from tuneloop.errors import UserError

BATCH_ROWS = 4096


def read_examples(path: Path, limit: int | None = None) -> list[Example]:
    """The rows of a prepared parquet file, in the order in which they were written.

    Args:
        path: the file.
        limit: only so many of the first rows; None for all.

    Raises:
        UserError: the file is missing, holds no rows, is damaged, or is not prepared data.
    """
    return list(iter_examples(path, limit))


def iter_examples(path: Path, limit: int | None = None) -> Iterator[Example]:
    """Like `read_examples`, holding one batch of rows in memory at a time.

    Raises:
        UserError: as in `read_examples`; a damaged row is reported when it is reached.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: a folder, expected a parquet file such as train.parquet inside it")
    try:
        with pq.ParquetFile(path) as file:
            problem = schema_problem(file.schema_arrow)
            if problem:
                raise UserError(f"{path}: not prepared data: {problem}; make it with the data_prep step")
            if not file.metadata.num_rows:
                raise UserError(f"{path}: holds no rows; give data_prep more rows or a larger share for this split")
            first = 0
            batch_rows = min(BATCH_ROWS, limit) if limit else BATCH_ROWS
            for batch in file.iter_batches(batch_size=batch_rows, columns=SCHEMA.names):
                if limit is not None:
                    batch = batch.slice(0, limit - first)
                if not batch.num_rows:
                    return
                yield from _examples(batch, path, first)
                first += batch.num_rows
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the data_prep step first") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error}); run the data_prep step again") from None


def _examples(batch: pa.RecordBatch, path: Path, first: int) -> Iterator[Example]:
    columns = {name: batch.column(name) for name in SCHEMA.names}
    for name, column in columns.items():
        if column.null_count:
            row = first + column.is_null().to_pylist().index(True)
            raise UserError(f"{path}: row {row + 1} has no {name}; run the data_prep step again")
    messages = _messages(columns.pop("messages"), path, first)
    metadata = columns.pop("metadata").to_pylist()
    rows = zip(*(column.to_pylist() for column in columns.values()), strict=True)
    names = list(columns)
    for index, values in enumerate(rows):
        yield Example(
            messages=messages[index],
            metadata=_metadata(metadata[index], path, first + index),
            **dict(zip(names, values, strict=True)),
        )


def _messages(column: pa.Array, path: Path, first: int) -> list[list[Message]]:
    """The messages of each row; flattening first is several times faster than `to_pylist` on nested values."""
    flat = column.flatten()
    roles, contents = flat.field("role").to_pylist(), flat.field("content").to_pylist()
    rows, start = [], 0
    for index, length in enumerate(column.value_lengths().to_pylist()):
        end = start + length
        if not length or None in roles[start:end] or None in contents[start:end]:
            raise UserError(f"{path}: row {first + index + 1} has an empty prompt; run the data_prep step again")
        rows.append([{"role": roles[i], "content": contents[i]} for i in range(start, end)])
        start = end
    return rows


def _metadata(text: str, path: Path, row: int) -> dict:
    if text == "{}":
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path}: row {row + 1} has metadata that is not a JSON object; run the data_prep step again")
    return value
