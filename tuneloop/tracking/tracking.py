"""Tracks a step while it runs: whatever it logs in its output folder goes to the configured trackers too."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuneloop.errors import TryAgain
from tuneloop.tracking.delivery import Delivery, in_short
from tuneloop.tracking.settings import TrackingSettings
from tuneloop.tracking.tracker import Outcome, TrackedRun, Tracker, Unavailable


@contextmanager
def tracked(
    settings: TrackingSettings, folder: Path, *, group: str, step: str, resolved: Mapping[str, Any]
) -> Iterator[None]:
    """While entered, every `metrics.jsonl` that grows under `folder` is sent to the trackers.

    A tracker that is off or fails is a printed line, never an error.

    Args:
        folder: the step's output.
        group: the run's name.
        step: the step's.
        resolved: the run's config as nested mappings.
    """
    parameters = flatten(resolved)

    def describe(number: str, log_folder: Path) -> TrackedRun:
        below = "" if log_folder == folder else f"/{log_folder.relative_to(folder)}"
        return TrackedRun(number, f"{group}/{step}{below}", group, step, log_folder, parameters)

    deliveries = [Delivery(kind, make, folder, describe) for kind, make in _trackers(settings).items()]
    for delivery in deliveries:
        delivery.start()
    outcome: Outcome = "failed"
    try:
        yield
        outcome = "finished"
    except TryAgain:
        outcome = "stopped"
        raise
    finally:
        for delivery in deliveries:
            delivery.finish(outcome)


def _trackers(settings: TrackingSettings) -> dict[str, Callable[[], Tracker]]:
    """Kind -> what makes a tracker, of those that can work; says which are on, and why one is off."""
    makers: dict[str, Callable[[], Tracker]] = {}
    if settings.mlflow:
        from tuneloop.tracking.mlflow_tracker import MlflowTracker

        mlflow = settings.mlflow
        makers["mlflow"] = lambda: MlflowTracker(mlflow)
    if settings.wandb:
        from tuneloop.tracking.wandb_tracker import WandbTracker

        wandb = settings.wandb
        makers["wandb"] = lambda: WandbTracker(wandb)
    for kind, make in list(makers.items()):
        try:
            print(f"tracking: {make().label}", flush=True)
        except Unavailable as error:
            print(f"tracking: {kind} is off: {error}", flush=True)
            del makers[kind]
        except Exception as error:  # a tracker's own mistake, such as an address that it cannot read
            print(f"tracking: {kind} is off: {in_short(error)}", flush=True)
            del makers[kind]
    return makers


def flatten(value: Any, prefix: str = "") -> dict[str, str | int | float | bool]:
    """Dotted names to plain values; lists, and tables whose keys are no names (patterns), become JSON."""
    if isinstance(value, Mapping) and all(re.fullmatch(r"\w+", key) for key in value):
        flat: dict[str, str | int | float | bool] = {}
        for key, inner in value.items():
            flat |= flatten(inner, f"{prefix}.{key}" if prefix else key)
        return flat
    return {prefix: value if isinstance(value, str | int | float | bool) else json.dumps(value)}
