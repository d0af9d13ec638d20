"""Parquet, from a local path, `file://` or `s3://`."""

import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop.data.record import Record, RowParser
from tuneloop.data.sources.files import local_size
from tuneloop.errors import UserError
from tuneloop.storage import local_copy

BATCH_ROWS = 1024
_CARRIED = ("metadata", "reward_kind")


class ParquetSource:
    """One record a row; only the columns that the parser asks for are read.

    Args:
        uri: the file.
        parser: makes rows of the records.
        limit: only so many of the first rows; 0 for all.
        kind: the first part of the source's name.
    """

    unit = "rows"

    def __init__(self, uri: str, parser: RowParser, limit: int = 0, kind: str = "parquet"):
        self.uri, self.parser, self.limit = uri, parser, limit
        self.name = f"{kind}:{uri}"
        self.total = self.consumed = 0
        local_size(uri)

    def records(self) -> Iterator[Record]:
        """Every row, as in `Source.records`."""
        with local_copy(self.uri) as path:
            try:
                with pq.ParquetFile(path) as file:
                    self.total = min(file.metadata.num_rows, self.limit or file.metadata.num_rows)
                    if not self.total:
                        raise UserError(f"{self.uri}: the file holds no rows")
                    yield from self._rows(file)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"{self.uri}: cannot be read as parquet ({error})") from None

    def _rows(self, file: pq.ParquetFile) -> Iterator[Record]:
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=self._columns(file.schema_arrow)):
            for value in batch.to_pylist():
                if self.consumed == self.total:
                    return
                self.consumed += 1
                yield Record(self.consumed, value)

    def _columns(self, schema: pa.Schema) -> list[str]:
        """The file's columns that hold what the parser needs."""
        needed = []
        for name in self.parser.columns:
            column = name if name in schema.names else name.partition(".")[0]
            if column not in schema.names:
                raise UserError(missing_column_message(self.uri, name, self.parser, schema.names))
            needed.append(column)
        carried = [name for name in _CARRIED if name in schema.names]
        return list(dict.fromkeys([*needed, *carried]))


def missing_column_message(uri: str, column: str, parser: RowParser, existing: list[str]) -> str:
    """One line that names the missing column, those that exist, and the setting to change."""
    setting = parser.columns[column]
    hint = f"; set {setting} to one of them" if setting else "; it is not of this kind"
    return f"{uri}: has no column {column!r}, only {', '.join(json.dumps(name) for name in existing)}{hint}"
