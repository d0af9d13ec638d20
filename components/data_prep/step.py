"""Sources to filtered, de-duplicated, split training data."""

from collections.abc import Callable, Mapping
from pathlib import Path

from components.config import RunConfig
from components.data_prep.config import SourceSettings
from components.runner import Step, Summary
from tuneloop.data.record import RowParser, Source
from tuneloop.settings import TaskSettings


def run(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Summary:
    """Read the sources and write train, validation and test rows, with an account of every row."""
    from tuneloop.data.prepare import NearDuplicateRule, PrepareSettings, prepare
    from tuneloop.data.tokens import load_tokenizer
    from tuneloop.models.sources import resolve_model

    settings = config.data_prep
    sources = [make_source(source, config.task) for source in settings.sources]
    near = settings.near_duplicates
    card = prepare(
        sources,
        load_tokenizer(resolve_model(config.model.uri)),
        PrepareSettings(
            test_share=settings.test_share,
            validation_share=settings.validation_share,
            max_prompt_tokens=settings.max_prompt_tokens,
            max_completion_tokens=settings.max_completion_tokens,
            quarantine_share=settings.quarantine_share,
            near_duplicates=NearDuplicateRule(near.threshold, near.ngram, near.permutations) if near.enabled else None,
            batch_rows=settings.batch_rows,
        ),
        output,
    )
    dropped = sum(card.dropped.values())
    print(
        f"data_prep: kept {card.kept:,} of {card.read:,} rows "
        f"({card.quarantined:,} in quarantine, {dropped:,} dropped): "
        + ", ".join(f"{split} {count:,}" for split, count in card.splits.items()),
        flush=True,
    )
    return {
        "rows_read": card.read,
        "rows_kept": card.kept,
        **{f"rows_{split}": count for split, count in card.splits.items()},
        "rows_quarantined": card.quarantined,
        "rows_dropped": dropped,
        **{f"dropped_{reason}": count for reason, count in card.dropped.items()},
        "changed": _changed(config, card.fingerprint),
    }


def _changed(config: RunConfig, fingerprint: str) -> bool:
    """Whether there is something to train: false only if it was asked for, and the incumbent was trained on this."""
    if not config.retrain.skip_unchanged:
        return True
    from tuneloop.registry import Registry

    place = config.promote
    incumbent = Registry(place.registry).resolve(place.adapter_name, place.alias)
    if incumbent is None or incumbent.record.get("data_fingerprint") != fingerprint:
        return True
    if incumbent.record.get("base_uri") != config.model.uri:
        return True  # a new base has learnt nothing of this data
    known = f"{place.adapter_name} version {incumbent.version}"
    print(f"data_prep: the data is what {known} was trained on: nothing to train", flush=True)
    return False


def make_source(settings: SourceSettings, task: TaskSettings) -> Source:
    """The source that one `[[data_prep.sources]]` table describes.

    Raises:
        UserError: a local file is missing, or a reasoning-gym task or option is unknown.
    """
    return _SOURCES[settings.kind](settings, task)


def _columns(settings: SourceSettings, task: TaskSettings) -> RowParser:
    from tuneloop.data.columns import ColumnParser

    return ColumnParser(
        prompt=settings.prompt_column,
        answer=settings.answer_column,
        completion=settings.completion_column,
        template=settings.template,
        system_prompt=task.system_prompt,
        reward_kinds=sorted({name for reward in task.rewards for name in (reward.kind, reward.name)}),
    )


def _jsonl(settings: SourceSettings, task: TaskSettings) -> Source:
    from tuneloop.data.sources import JsonlSource

    return JsonlSource(settings.uri, _columns(settings, task), settings.size)


def _parquet(settings: SourceSettings, task: TaskSettings) -> Source:
    from tuneloop.data.sources import ParquetSource

    return ParquetSource(settings.uri, _columns(settings, task), settings.size)


def _gsm8k(settings: SourceSettings, task: TaskSettings) -> Source:
    from tuneloop.data.gsm8k import Gsm8kParser
    from tuneloop.data.sources import JsonlSource, ParquetSource

    parser = Gsm8kParser(settings.template, task.system_prompt)
    kind = ParquetSource if settings.uri.endswith(".parquet") else JsonlSource
    return kind(settings.uri, parser, settings.size, kind="gsm8k")


def _huggingface(settings: SourceSettings, task: TaskSettings) -> Source:
    from tuneloop.data.sources import HuggingFaceSource

    return HuggingFaceSource(
        settings.uri, _columns(settings, task), settings.split, settings.revision, limit=settings.size
    )


def _reasoning_gym(settings: SourceSettings, task: TaskSettings) -> Source:
    from tuneloop.data.sources import ReasoningGymSource

    scored = any(reward.kind == "reasoning_gym" for reward in task.rewards)
    return ReasoningGymSource(
        settings.task,
        settings.size,
        settings.seed,
        settings.options,
        settings.template,
        task.system_prompt,
        reward_kind="reasoning_gym" if scored else "",
    )


_SOURCES: dict[str, Callable[[SourceSettings, TaskSettings], Source]] = {
    "jsonl": _jsonl,
    "parquet": _parquet,
    "gsm8k": _gsm8k,
    "huggingface": _huggingface,
    "reasoning_gym": _reasoning_gym,
}

STEP = Step(name="data_prep", inputs=(), run=run, sections=("model", "task", "data_prep", "retrain"))
