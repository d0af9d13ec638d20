"""A run on a cluster as every backend shows it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

PENDING, RUNNING, PAUSED, CANCELLING = "pending", "running", "paused", "cancelling"
SUCCEEDED, FAILED, CANCELLED, SKIPPED = "succeeded", "failed", "cancelled", "skipped"
ENDED = (SUCCEEDED, FAILED, CANCELLED, SKIPPED)


@dataclass(frozen=True)
class StepView:
    """One step: its state, and when it began and ended as far as it did."""

    state: str
    began: datetime | None = None
    ended: datetime | None = None
    message: str = ""


@dataclass(frozen=True)
class RunView:
    """One run.

    Attributes:
        id: the backend's own.
        steps: those of `NODES` that have begun, or are known to be left out.
        parameters: what the run was started with.
        message: why it failed, as the backend says it.
    """

    id: str
    name: str
    state: str
    created: datetime | None = None
    ended: datetime | None = None
    steps: Mapping[str, StepView] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    message: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ENDED

    @property
    def output_uri(self) -> str:
        """The run folder."""
        return str(self.parameters.get("output_uri", ""))


class Backend(Protocol):
    """A server that runs pipelines.

    Attributes:
        target: its name on the command line.
        pod_namespace: where its runs' pods are.
    """

    target: str
    pod_namespace: str

    def find(self, run: str) -> RunView | None:
        """The newest run of that id or name."""
        ...

    def refresh(self, run: RunView) -> RunView:
        """The run as it is now."""
        ...

    def newest(self, count: int) -> list[RunView]:
        """The newest runs, without their steps."""
        ...

    def link(self, run: RunView) -> str:
        """Where a person looks at it: a console's URL, or a command."""
        ...

    def pod_labels(self, run: RunView) -> str:
        """The label selector of its pods."""
        ...
