"""A tick of a schedule: what its time and the incumbent of that moment mean for the config.

Resolved once, by the check; every later step reads the result, so a tick that is retried uses the same data and starts
from the same adapter.
"""

import re
from datetime import UTC, date, datetime, timedelta

from components.config import RunConfig
from components.data_prep.config import SourceSettings
from tuneloop.config import parse_config
from tuneloop.errors import UserError
from tuneloop.storage import storage_for

_DAY = re.compile(r"\{day(?::([^{}]*))?\}")


def resolve_tick(config: RunConfig, schedule_time: str) -> RunConfig:
    """The config with its data window and its start filled in.

    Args:
        schedule_time: when the tick was due, ISO 8601; empty: now.

    Raises:
        UserError: no such time, no data in the window, or an incumbent of another base.
        TryAgain: storage is unavailable.
    """
    data = config.model_dump(mode="json")
    if any(_DAY.search(source.uri) for source in config.data_prep.sources):
        days = window(_parse_time(schedule_time), config.retrain.window_days)
        sources = [found for source in config.data_prep.sources for found in _in_window(source, days)]
        data["data_prep"]["sources"] = [source.model_dump(mode="json") for source in sources]
    if config.retrain.warm_start and not config.lora.start_from:
        data["lora"]["start_from"] = _incumbent_uri(config)
    return parse_config(RunConfig, data, origin="config")


def window(due: datetime, days: int) -> list[date]:
    """The whole days (UTC) before the day of `due`, the earliest first."""
    last = due.astimezone(UTC).date()
    return [last - timedelta(days=back) for back in range(days, 0, -1)]


def _parse_time(text: str) -> datetime:
    if not text:
        return datetime.now(UTC)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"schedule_time {text!r}: expected ISO 8601, such as 2026-11-23T03:00:00Z") from None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _in_window(source: SourceSettings, days: list[date]) -> list[SourceSettings]:
    """The source once for each day of the window that has data; as it is when its uri names no day."""
    if not _DAY.search(source.uri):
        return [source]
    found, missing = [], []
    for day in days:
        uri = _DAY.sub(lambda match, day=day: day.strftime(match[1] or "%Y-%m-%d"), source.uri)
        storage, key = storage_for(uri)
        (found if storage.exists(key) else missing).append(uri)
    if not found:
        raise UserError(f"data_prep.sources: nothing at {missing[0]} … {missing[-1]}: no data in the window of "
                        f"{len(days)} days (retrain.window_days)")  # fmt: skip
    for uri in missing:
        print(f"check: no data at {uri}, a day of the window", flush=True)
    return [source.model_copy(update={"uri": uri}) for uri in found]


def _incumbent_uri(config: RunConfig) -> str:
    """Where the incumbent's adapter lies; empty while there is none."""
    from tuneloop.registry import Registry

    place = config.promote
    version = Registry(place.registry).resolve(place.adapter_name, place.alias)
    if version is None:
        return ""
    trained_on = version.record.get("base_uri")
    if trained_on != config.model.uri:
        raise UserError(
            f"retrain.warm_start: {place.adapter_name} version {version.version} was trained on {trained_on}, not on "
            f"model.uri = {config.model.uri}; set it to false, or choose another adapter_name"
        )
    return f"{place.registry.rstrip('/')}/{place.adapter_name}/versions/{version.version}"
