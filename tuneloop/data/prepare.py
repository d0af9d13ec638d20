"""From sources to splits in one stream: parse, count tokens, filter by length, de-duplicate, split, write.

While the tokenizer works on one batch in its own thread, the next one is parsed and the last one is written; memory
holds a few batches, whatever the number of rows. What has to be remembered of every kept row lies in scratch files
(`tuneloop.data.scratch`) and in one 8-byte content key for the contamination check.
"""

import json
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tuneloop.data.card import DataCard, SourceTally
from tuneloop.data.chat import require_chat_template
from tuneloop.data.identity import content_id, split_of
from tuneloop.data.near_duplicates import NearDuplicates
from tuneloop.data.prompt_template import PromptTemplate
from tuneloop.data.quarantine import Quarantine
from tuneloop.data.record import BadRow, Record, Row, Source, missing_column
from tuneloop.data.schema import SPLITS
from tuneloop.data.scratch import HashTable
from tuneloop.data.sources.parquet import missing_column_message
from tuneloop.data.tokens import TokenCounter
from tuneloop.data.writer import SplitWriter
from tuneloop.errors import UserError
from tuneloop.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class NearDuplicateRule:
    """How similar two prompts may be; see `NearDuplicates`."""

    threshold: float
    ngram: int
    permutations: int


@dataclass(frozen=True)
class PrepareSettings:
    """What is kept, and how it is split; the fields mean what the settings of the data_prep step say."""

    test_share: float
    validation_share: float
    max_prompt_tokens: int
    max_completion_tokens: int
    quarantine_share: float
    near_duplicates: NearDuplicateRule | None = None
    batch_rows: int = 4096


@dataclass
class _Batch:
    """Parsed rows on their way to the tokenizer and back."""

    tally: SourceTally
    rows: list[Row] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)


def prepare(
    sources: Sequence[Source], tokenizer: "PreTrainedTokenizerBase", settings: PrepareSettings, output: Path
) -> DataCard:
    """Fill `output` with the splits, the quarantine and the data card of `docs/formats.md`.

    Args:
        sources: read in this order; the first of two equal prompts stays.
        tokenizer: counts the tokens; needs a chat template.
        settings: filters and shares.
        output: an existing folder; on an error nothing of ours is left in it.

    Returns:
        The data card, as written.

    Raises:
        UserError: a source is unreadable, has too many bad rows, or no row (or no training row) is left.
        TryAgain: a source's storage cannot be reached.
    """
    require_chat_template(tokenizer)
    scratch = output / ".scratch"
    scratch.mkdir()
    try:
        with SplitWriter(output) as writer, Quarantine(output) as quarantine, TokenCounter(tokenizer) as counter:
            preparation = _Preparation(tokenizer, settings, writer, quarantine, scratch)
            pending: deque[tuple[_Batch, Future[np.ndarray]]] = deque()
            for batch in preparation.batches(sources):
                pending.append((batch, counter.submit(batch.prompts + [row.completion for row in batch.rows])))
                if len(pending) > _BATCHES_AHEAD:
                    preparation.keep(*_counted(*pending.popleft()))
            for batch, future in pending:
                preparation.keep(*_counted(batch, future))
            card = preparation.finish()
            writer.finish()
            quarantine.finish()
        (output / "data_card.json").write_text(card.as_json(), encoding="utf-8")
    finally:
        shutil.rmtree(scratch)
    return card


def _counted(batch: _Batch, counts: "Future[np.ndarray]") -> tuple[_Batch, np.ndarray, np.ndarray]:
    prompt_tokens, completion_tokens = counts.result().reshape(2, -1)
    return batch, prompt_tokens, completion_tokens + 1  # the end token


class _Preparation:
    """The two halves of the stream, before and behind the tokenizer, and their account."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        settings: PrepareSettings,
        writer: SplitWriter,
        quarantine: Quarantine,
        scratch: Path,
    ):
        self._settings, self._writer, self._quarantine = settings, writer, quarantine
        self._template = PromptTemplate(tokenizer)
        self._card = DataCard()
        self._seen = HashTable(scratch, "ids", words=2)
        rule = settings.near_duplicates
        self._near = NearDuplicates(scratch, rule.threshold, rule.ngram, rule.permutations) if rule else None
        self._content_keys: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self._shortest_prompt: int | None = None

    def batches(self, sources: Sequence[Source]) -> Iterator[_Batch]:
        """Parsed, rendered rows of all sources; bad ones go to quarantine on the way."""
        for source in sources:
            tally = SourceTally(source.name)
            self._card.sources.append(tally)
            records = source.records()
            with Progress(f"data_prep: {source.name}, {source.unit}", source.total) as progress:
                while read := list(islice(records, self._settings.batch_rows)):
                    if not tally.read:
                        _require_columns(source, read)
                    tally.read += len(read)
                    yield self._parse(source, tally, read)
                    progress.total = source.total
                    progress.advance(source.consumed - progress.done, note=f"{tally.read:,} rows")

    def _parse(self, source: Source, tally: SourceTally, records: list[Record]) -> _Batch:
        batch, parser, template = _Batch(tally), source.parser, self._template
        for record in records:
            try:
                if record.value is None:
                    raise BadRow(record.problem)
                row = parser(record.value)
                row_id = content_id(row.roles, row.contents)
                _require_unicode(row)
                prompt = template.render(row.roles, row.contents)
            except UnicodeEncodeError:
                self._set_aside(source, record, "the text holds a lone surrogate, so it is not valid Unicode")
            except BadRow as problem:
                self._set_aside(source, record, str(problem))
            except UserError as problem:  # the chat template refuses this conversation
                self._set_aside(source, record, str(problem))
            else:
                batch.rows.append(row)
                batch.ids.append(row_id)
                batch.prompts.append(prompt)
        return batch

    def _set_aside(self, source: Source, record: Record, reason: str) -> None:
        text = record.text or json.dumps(record.value, default=str)
        self._quarantine.add(source.name, record.line, reason, text)

    def keep(self, batch: _Batch, prompt_tokens: np.ndarray, completion_tokens: np.ndarray) -> None:
        """Filter, split and write the rows of a batch whose tokens have been counted."""
        if not batch.rows:
            return
        shortest = int(prompt_tokens.min())
        self._shortest_prompt = min(shortest, shortest if self._shortest_prompt is None else self._shortest_prompt)
        keys = np.frombuffer(bytes.fromhex("".join(batch.ids)), ">u8").astype(np.uint64).reshape(-1, 2)
        alive = np.arange(len(batch.rows))
        alive = self._drop("prompt_too_long", alive, prompt_tokens > self._settings.max_prompt_tokens)
        alive = self._drop("completion_too_long", alive, completion_tokens > self._settings.max_completion_tokens)
        if len(alive):
            alive = self._drop("exact_duplicate", alive, ~self._seen.insert(keys[alive])[1], of_alive=True)
        if self._near is not None and len(alive):
            texts = ["\n".join(_shown(batch.rows[index])) for index in alive]
            alive = self._drop("near_duplicate", alive, self._near.drop(texts), of_alive=True)
        self._write(batch, alive, keys[:, 0], prompt_tokens, completion_tokens)

    def _drop(self, reason: str, alive: np.ndarray, drop: np.ndarray, of_alive: bool = False) -> np.ndarray:
        stay = alive[~drop] if of_alive else alive[~drop[alive]]
        self._card.dropped[reason] += len(alive) - len(stay)
        return stay

    def _write(
        self,
        batch: _Batch,
        alive: np.ndarray,
        keys: np.ndarray,
        prompt_tokens: np.ndarray,
        completion_tokens: np.ndarray,
    ) -> None:
        card, settings = self._card, self._settings
        members: dict[str, list[int]] = {split: [] for split in SPLITS}
        prompts, completions = prompt_tokens.tolist(), completion_tokens.tolist()
        for index in alive.tolist():
            row, row_id = batch.rows[index], batch.ids[index]
            split = split_of(row_id, settings.test_share, settings.validation_share)
            self._writer.add(split, row_id, row, batch.tally.source, prompts[index], completions[index])
            card.keep(split, row_id, row)
            members[split].append(index)
        for split, indices in members.items():
            self._content_keys[split].append(keys[indices])
        batch.tally.kept += len(alive)
        card.prompt_tokens.update(prompt_tokens[alive].tolist())
        card.completion_tokens.update(completion_tokens[alive].tolist())

    def finish(self) -> DataCard:
        """The account, once every row is accounted for and none of the refusals applies."""
        card, settings = self._card, self._settings
        card.quarantined = self._quarantine.count
        self._quarantine.check(card.read, settings.quarantine_share)
        assert card.read == card.kept + card.quarantined + sum(card.dropped.values())
        self._require_rows()
        card.contamination = self._check_contamination()
        return card

    def _require_rows(self) -> None:
        card, settings = self._card, self._settings
        if not card.kept:
            if card.dropped["prompt_too_long"] == sum(card.dropped.values()) and self._shortest_prompt is not None:
                raise UserError(
                    f"every prompt is longer than data_prep.max_prompt_tokens = {settings.max_prompt_tokens}; "
                    f"the shortest has {self._shortest_prompt} tokens: raise it to at least that"
                )
            reasons = [f"{reason} {count:,}" for reason, count in card.dropped.items() if count]
            if card.quarantined:
                reasons.append(f"quarantined {card.quarantined:,}")
            raise UserError(f"no row is left of {card.read:,} read: {', '.join(reasons)}; loosen that filter")
        if not card.splits["train"]:
            raise UserError(
                f"all {card.kept:,} rows fell into test and validation, so none is left to train on; "
                "add rows, or lower data_prep.test_share and data_prep.validation_share"
            )

    def _check_contamination(self) -> dict[str, int]:
        """Compare the content keys of the rows as written: no training prompt may be an evaluation prompt."""
        train, validation, test = (np.concatenate(self._content_keys[split]) for split in SPLITS)
        evaluation = np.concatenate([validation, test])
        overlap = int(np.isin(train, evaluation).sum())
        assert not overlap, f"{overlap} training rows are evaluation prompts"
        return {"training_rows": len(train), "evaluation_rows": len(evaluation), "overlapping": overlap}


def _shown(row: Row) -> list[str]:
    """The texts that tell one prompt from another; the system message is the same for all."""
    return [text for role, text in zip(row.roles, row.contents, strict=True) if role != "system"]


def _require_unicode(row: Row) -> None:
    for text in (row.answer, row.completion):
        if not text.isascii():
            text.encode()


def _require_columns(source: Source, records: list[Record]) -> None:
    """Refuse a source none of whose first records has a column that is needed."""
    values = [record.value for record in records if record.value is not None]
    column = missing_column(values, source.parser)
    if column is not None:
        existing = list(dict.fromkeys(name for value in values for name in value))
        raise UserError(missing_column_message(source.name, column, source.parser, existing))
