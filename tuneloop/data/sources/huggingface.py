"""Data sets of the Hugging Face hub, or local folders in one of its layouts, streamed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tuneloop.data.record import Record, RowParser
from tuneloop.errors import TryAgain, UserError


class HuggingFaceSource:
    """One record a row of one split.

    Args:
        uri: `organisation/name` on the hub, or a local folder (data files, or what `save_to_disk` wrote).
        parser: makes rows of the records.
        split: the split's name.
        revision: branch, tag or commit on the hub; empty for the default.
        limit: only so many of the first rows; 0 for all.
    """

    unit = "rows"

    def __init__(self, uri: str, parser: RowParser, split: str = "train", revision: str = "", limit: int = 0):
        self.uri, self.parser, self.split, self.revision, self.limit = uri, parser, split, revision, limit
        self.name = f"huggingface:{uri}"
        self.total, self.consumed = limit, 0

    def records(self) -> Iterator[Record]:
        """Every row, as in `Source.records`."""
        from datasets.exceptions import DatasetGenerationError

        try:
            for value in self._open():
                if self.limit and self.consumed == self.limit:
                    return
                self.consumed += 1
                yield Record(self.consumed, value)
        except (ConnectionError, TimeoutError) as error:
            raise TryAgain(f"{self.uri}: the hub cannot be reached ({error})") from None
        except DatasetGenerationError as error:
            raise UserError(f"{self.uri}: cannot be read ({error.__cause__ or error})") from None
        if not self.consumed:
            raise UserError(f"{self.uri}: the split {self.split!r} holds no rows")

    def _open(self) -> Any:
        import datasets
        from datasets.exceptions import DatasetNotFoundError
        from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

        folder = Path(self.uri)
        try:
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                return self._saved(datasets.load_from_disk(str(folder)))
            return datasets.load_dataset(self.uri, split=self.split, revision=self.revision or None, streaming=True)
        except DatasetNotFoundError as error:
            raise UserError(f"{self.uri}: no such data set on the hub, or a private one ({error})") from None
        except FileNotFoundError:
            raise UserError(f"{self.uri}: no such local folder, and no data files in it or on the hub") from None
        except ValueError as error:
            raise UserError(f"{self.uri}: cannot be opened ({error})") from None
        except (HfHubHTTPError, OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
            raise TryAgain(f"{self.uri}: the hub cannot be reached ({error})") from None

    def _saved(self, saved: Any) -> Any:
        if not hasattr(saved, "keys"):
            return saved
        if self.split not in saved:
            raise UserError(f"{self.uri}: has no split {self.split!r}, only {', '.join(saved)}; set split")
        return saved[self.split]
