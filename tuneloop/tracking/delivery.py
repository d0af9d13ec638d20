"""Brings the rows of training's logs to one tracker, in a thread of its own that nobody has to wait for."""

import json
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tuneloop.tracking.follow import Follower
from tuneloop.tracking.tracker import Outcome, TrackedRun, Tracker

LOG = "metrics.jsonl"
MESSAGE_LENGTH = 200
POLL_SECONDS = 1.0
RETRY_SECONDS = 30.0  # after a failure
# At the end; whoever was told to stop has a grace of about half a minute for everything.
CLOSE_SECONDS: Mapping[Outcome, float] = {"finished": 30.0, "failed": 30.0, "stopped": 5.0}


class Delivery(threading.Thread):
    """Follows every log under a folder; what the tracker does not take is kept and tried again.

    Args:
        kind: the tracker's short name; `<kind>.json` beside a log holds the tracked run's id and how far it came.
        make: makes a tracker for one log.
        folder: the output of the step, where logs appear.
        describe: makes the tracked run of a log from its id and folder.
    """

    def __init__(
        self, kind: str, make: Callable[[], Tracker], folder: Path, describe: Callable[[str, Path], TrackedRun]
    ):
        super().__init__(name=f"tracking-{kind}", daemon=True)
        self._kind, self._make, self._folder, self._describe = kind, make, folder, describe
        self._logs: dict[Path, _Log] = {}
        self._stop_asked = threading.Event()
        self._outcome: Outcome = "failed"
        self._trouble = ""

    def run(self) -> None:
        """Until `finish`: look for rows, deliver them."""
        stopping = False
        while not stopping:
            stopping = self._stop_asked.wait(RETRY_SECONDS if self._trouble else POLL_SECONDS)
            self._attempt(self._deliver)
        for log in self._logs.values():
            if log.opened:
                self._attempt(lambda log=log: log.close(self._outcome))

    def finish(self, outcome: Outcome) -> None:
        """Deliver what is left, for a bounded time, and end the tracked runs."""
        self._outcome = outcome
        self._stop_asked.set()
        self.join(CLOSE_SECONDS[outcome])
        missing = sum(len(log.waiting) for log in self._logs.values())
        if self.is_alive() or missing:
            print(f"tracking: {self._kind} has not got everything ({missing} updates); {LOG} has", flush=True)

    def _deliver(self) -> None:
        for path in sorted(self._folder.rglob(LOG)):
            if path not in self._logs:
                self._logs[path] = _Log(path, self._kind, self._make(), self._describe)
            self._logs[path].deliver()

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever goes wrong in a tracker, training goes on
            if not self._trouble:
                print(f"tracking: {self._kind} fails ({in_short(error)}); training goes on", flush=True)
            self._trouble = str(error) or type(error).__name__
        else:
            if self._trouble:
                print(f"tracking: {self._kind} works again", flush=True)
            self._trouble = ""


def in_short(error: Exception) -> str:
    """One line of a reasonable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}…"


class _Log:
    """One `metrics.jsonl` and its tracked run."""

    def __init__(self, path: Path, kind: str, tracker: Tracker, describe: Callable[[str, Path], TrackedRun]):
        self._tracker, self._describe, self._folder = tracker, describe, path.parent
        self._follower = Follower(path)
        self._record = path.parent / f"{kind}.json"
        self.opened = False
        self._delivered = -1
        self.waiting: deque[dict[str, Any]] = deque()

    def deliver(self) -> None:
        """Open the tracked run if that is not done yet, and write the rows that it has not got."""
        self.waiting.extend(self._follower.rows())
        if not self.opened:
            known = json.loads(self._record.read_text()) if self._record.exists() else {"id": uuid.uuid4().hex[:16]}
            self._delivered = known.get("update", -1)
            # The id is on the disk before the tracker hears of it, or a kill in between would leave two runs.
            self._save({"id": known["id"], "update": self._delivered})
            held = self._tracker.open(self._describe(known["id"], self._folder))
            self._delivered = max(self._delivered, held)
            self._id, self.opened = known["id"], True
        while self.waiting:
            row = self.waiting[0]
            update = row["update"]
            if update > self._delivered:
                values = {name: value for name, value in row.items() if name != "update"}
                self._tracker.write(update, values)
                self._delivered = update
                self._save({"id": self._id, "update": update})
            self.waiting.popleft()

    def close(self, outcome: Outcome) -> None:
        """End the tracked run, which is open."""
        self._tracker.close(outcome)

    def _save(self, record: Mapping[str, Any]) -> None:
        partial = self._record.with_name(f".{self._record.name}.partial")
        partial.write_text(json.dumps(record) + "\n")
        os.replace(partial, self._record)
