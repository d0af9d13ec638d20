"""The seam between the metrics of a run and a place that shows them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Outcome = Literal["finished", "stopped", "failed"]  # stopped: the same command continues later


@dataclass(frozen=True)
class TrackedRun:
    """What is tracked: one `metrics.jsonl`.

    Attributes:
        id: its own for ever, stored beside the log, so that a resumed run goes on where it was.
        name: `<run>/<step>`.
        group: `<run>`; the steps of one run share it.
        step: the step of the DAG.
        folder: where the log is.
        parameters: the run's resolved settings, dotted names to values.
    """

    id: str
    name: str
    group: str
    step: str
    folder: Path
    parameters: Mapping[str, str | int | float | bool]


class Unavailable(Exception):
    """The tracker is off; the message says why in a few words."""


class Tracker(Protocol):
    """Shows one run. Any method may raise: whoever calls it says so in a line, and training goes on.

    Attributes:
        label: its name for people, with its address.
    """

    label: str

    def open(self, run: TrackedRun) -> int:
        """Begin the run or go on with it; returns the last update that is there already, -1 for none."""
        ...

    def write(self, update: int, values: Mapping[str, float]) -> None:
        """Add one update; updates come in ascending order, each once."""
        ...

    def close(self, outcome: Outcome) -> None:
        """Everything is written, or nothing more will come in this process."""
        ...
