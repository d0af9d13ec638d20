"""JSON Lines, plain or gzip, from a local path, `file://` or `s3://`."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import cast

from tuneloop.data.record import Record, RowParser
from tuneloop.data.sources.files import local_size
from tuneloop.errors import UserError
from tuneloop.storage import read_stream

_HEAD_BYTES = 8192
_LINE_BYTES = 1 << 26  # a longer line is no row: it would only fill memory
_MAGIC = {b"PAR1": 'a parquet file; write kind = "parquet"', b"PK\x03\x04": "a zip archive; unpack it"}


class JsonlSource:
    """One JSON object a line; blank lines are not rows.

    Args:
        uri: the file; a name that ends in `.gz` is read as gzip.
        parser: makes rows of the objects.
        limit: only so many of the first rows; 0 for all.
        kind: the first part of the source's name.
    """

    unit = "kB"

    def __init__(self, uri: str, parser: RowParser, limit: int = 0, kind: str = "jsonl"):
        self.uri, self.parser, self.limit = uri, parser, limit
        self.name = f"{kind}:{uri}"
        self.total = local_size(uri) // 1_000
        self._bytes = 0

    @property
    def consumed(self) -> int:
        """Kilobytes read of the (uncompressed) file."""
        return self._bytes // 1_000

    def records(self) -> Iterator[Record]:
        """Every line that is not blank, as in `Source.records`."""
        rows = 0
        with _open(self.uri) as stream:
            for line, raw in enumerate(_lines(stream, self.uri), start=1):
                self._bytes += len(raw)
                if not raw.strip():
                    continue
                if self.limit and rows == self.limit:
                    break
                rows += 1
                yield _record(line, raw)
        if not rows:
            raise UserError(f"{self.uri}: the file is empty; name a file with one JSON object a line")


def _record(line: int, raw: bytes) -> Record:
    try:
        value = json.loads(raw)
    except UnicodeDecodeError:
        return Record(line, None, raw.decode("utf-8", "replace"), "not UTF-8 text")
    except (ValueError, RecursionError) as error:
        return Record(line, None, raw.decode("utf-8", "replace"), f"malformed JSON: {error}")
    if type(value) is not dict:
        return Record(line, None, raw.decode(), f"a {type(value).__name__}, expected a JSON object")
    return Record(line, value)


def _open(uri: str) -> io.BufferedReader:
    stream = cast(io.BufferedReader, read_stream(uri))
    return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=stream))) if uri.endswith(".gz") else stream


def _lines(stream: io.BufferedReader, uri: str) -> Iterator[bytes]:
    """The lines of a text stream.

    Raises:
        UserError: the stream is binary.
    """
    try:
        _refuse_binary(stream.peek(_HEAD_BYTES)[:_HEAD_BYTES], uri)
        line = stream.readline(_LINE_BYTES)
        while line:
            if len(line) >= _LINE_BYTES:
                raise UserError(f"{uri}: has a line of over {_LINE_BYTES >> 20} MiB, so it is no JSON Lines file")
            yield line
            line = stream.readline(_LINE_BYTES)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{uri}: damaged gzip ({error})") from None


def _refuse_binary(head: bytes, uri: str) -> None:
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise UserError(f"{uri}: {what}")
    if head.startswith(b"\x1f\x8b"):
        raise UserError(f"{uri}: gzip data; give the file a name that ends in .gz")
    if b"\0" in head:
        raise UserError(f"{uri}: a binary file; name a text file with one JSON object a line")
