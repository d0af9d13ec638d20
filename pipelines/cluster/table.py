"""The steps of a run as a table: state, duration and last metric of each."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

from pipelines.cluster.run_view import ENDED, FAILED, RUNNING, SKIPPED, SUCCEEDED, RunView, StepView
from pipelines.steps import NODES

_MARKS = {SUCCEEDED: "✓", FAILED: "✗", RUNNING: "▶", SKIPPED: "-"}
_QUIET_SECONDS = 60.0  # between two lines of a log about one running step


def table_lines(run: RunView, metrics: Mapping[str, str]) -> list[str]:
    """The run in a line, and a line a step."""
    lines = [f"{run.name}: {run.state}{_took(run.created, run.ended, '  ')}"]
    for name in NODES:
        step = run.steps.get(name)
        state = step.state if step else "not run" if run.has_ended else "waiting"
        took = _took(step.began, step.ended) if step else ""
        mark = _MARKS.get(state, "·")
        lines.append(f"  {mark} {name:<14} {state:<10} {took:>8}  {metrics.get(name, '')}".rstrip())
    return lines


class StepTable:
    """Draws the table over its last one."""

    def __init__(self, stream: TextIO):
        self._stream, self._drawn = stream, 0

    def draw(self, run: RunView, metrics: Mapping[str, str]) -> None:
        """Show the run as it is now."""
        import shutil

        width = shutil.get_terminal_size().columns - 1  # a line that wraps would not be drawn over
        lines = [line[:width] for line in table_lines(run, metrics)]
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        self._stream.write(up + "".join(f"{line}\x1b[K\n" for line in lines))
        self._stream.flush()
        self._drawn = len(lines)


class ChangeLog:
    """Writes a line when a step's state changes, and now and then its last metric."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._states: dict[str, str] = {}
        self._told: dict[str, tuple[datetime, str]] = {}

    def draw(self, run: RunView, metrics: Mapping[str, str]) -> None:
        """Write what is new."""
        self._line("run", run.state, _took(run.created, run.ended) if run.has_ended else "", run.message)
        for name in NODES:
            if step := run.steps.get(name):
                self._step(name, step, metrics.get(name, ""))

    def _step(self, name: str, step: StepView, metric: str) -> None:
        now = datetime.now(UTC)
        took = _took(step.began, step.ended) if step.state in ENDED else ""
        self._line(name, step.state, took, metric or step.message)
        told, last = self._told.get(name, (now, ""))
        if step.state == RUNNING and metric != last and (not last or (now - told).total_seconds() >= _QUIET_SECONDS):
            self._told[name] = (now, metric)
            if last:
                self._write(f"{name}: {metric}")

    def _line(self, name: str, state: str, took: str, more: str) -> None:
        if self._states.get(name) != state:
            self._states[name] = state
            self._write(f"{name}: {state}" + (f" after {took}" if took else "") + (f", {more}" if more else ""))

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def _took(began: datetime | None, ended: datetime | None, before: str = "") -> str:
    if began is None:
        return ""
    return before + clock(((ended or datetime.now(UTC)) - began).total_seconds())


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
