"""The pods of a TrainJob: their logs shown as they are written, and how each of them ended."""

import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from components.lora_rl.trainjob.api import TrainJobApi
from components.lora_rl.trainjob.manifest import NODE
from components.pod_log import PodLog
from tuneloop.errors import TuneloopError

INDEX_LABEL = "batch.kubernetes.io/job-completion-index"  # of a pod: which node it is
POLL_SECONDS = 3.0
_UNKNOWN = datetime.max.replace(tzinfo=UTC)
_ENDED = ("Succeeded", "Failed", "")


@dataclass(frozen=True)
class Ending:
    """How a node's container ended.

    Attributes:
        node: its rank.
        exit_code: as `tuneloop.errors`, or 128 and a signal's number.
        reason: Kubernetes', such as OOMKilled.
        message: its last words, in one line.
        at: when.
    """

    node: str
    exit_code: int
    reason: str
    message: str
    at: datetime


class Pods:
    """While entered, follows the pods of a job in threads of its own.

    Attributes:
        running: whether the containers of as many pods as there are nodes run.
        waiting: why a pod does not start, in a few words.
        endings: how containers ended, the newest last.
    """

    def __init__(self, api: TrainJobApi, name: str, nodes: int):
        self._api, self._name, self._nodes = api, name, nodes
        self.running, self.waiting = False, ""
        self.endings: dict[str, Ending] = {}  # by the pod's uid
        self._logs: dict[str, threading.Thread] = {}
        self._leaving, self._closed = threading.Event(), False
        self._printing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="pods", daemon=True)

    def __enter__(self) -> "Pods":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close(0.0)

    def close(self, seconds: float) -> None:
        """Stop looking for pods, and let the logs of those that have ended come to their end.

        Args:
            seconds: at most.
        """
        self._leaving.set()
        deadline = time.monotonic() + seconds
        self._thread.join(seconds)  # it may start to follow logs until its end
        for thread in list(self._logs.values()):
            thread.join(max(0.0, deadline - time.monotonic()))
        self._closed = True

    def last_endings(self) -> list[Ending]:
        """How each node's last container ended, the first to end first."""
        last = {ending.node: ending for ending in sorted(self.endings.values(), key=lambda ending: ending.at)}
        return sorted(last.values(), key=lambda ending: ending.at)

    def look(self) -> None:
        """See what the pods do now.

        Raises:
            TryAgain: the server is away.
        """
        found = self._api.pods(self._name)
        containers = {pod.metadata.uid: _container(pod) for pod in found}
        for pod in found:
            state = containers[pod.metadata.uid]
            if state and state.terminated:
                self.endings.setdefault(pod.metadata.uid, _ending(_node(pod), state.terminated))
            if pod.metadata.uid not in self._logs and state and (state.running or state.terminated):
                thread = threading.Thread(target=self._follow, args=(pod,), name=pod.metadata.name, daemon=True)
                self._logs[pod.metadata.uid] = thread
                thread.start()
        at_work = [state for state in containers.values() if state and (state.running or state.terminated)]
        self.running = len(at_work) >= self._nodes
        self.waiting = next(filter(None, map(_why_waiting, found)), "") if not self.running else ""

    def _run(self) -> None:
        while True:
            self._patiently(self.look)
            if self._leaving.wait(POLL_SECONDS):
                self._patiently(self.look)  # pods that were short
                return

    def _follow(self, pod: Any) -> None:
        node = _node(pod)
        log = PodLog(
            self._api.server, lambda: self._api.core, self._api.namespace, pod.metadata.name, NODE,
            lambda line: self._print(node, line),
        )  # fmt: skip
        while not self._closed:
            gone = self._has_ended(pod)  # before the log is read: what it writes last is read too
            if (self._patiently(log.read) and gone) or (self._leaving.is_set() and gone):
                return
            self._leaving.wait(POLL_SECONDS / 3)

    def _has_ended(self, pod: Any) -> bool:
        return self._patiently(lambda: self._api.phase(pod.metadata.name)) in _ENDED

    def _print(self, node: str, line: str) -> None:
        with self._printing:
            if self._closed:
                return
            print(f"node {node} | {line}", flush=True)

    def _patiently(self, action: Any) -> Any:
        """`action`'s result; None when the server is away, which is said and no reason to stop looking."""
        try:
            return action()
        except TuneloopError as error:
            print(f"warning: the pods of {self._name} cannot be seen: {error}", file=sys.stderr, flush=True)
            return None


def _node(pod: Any) -> str:
    return (pod.metadata.labels or {}).get(INDEX_LABEL, "?")


def _container(pod: Any) -> Any:
    """The state of the container that trains; None before there is one."""
    statuses = pod.status.container_statuses or []
    return next((status.state for status in statuses if status.name == NODE), None)


def _ending(node: str, terminated: Any) -> Ending:
    message = " ".join((terminated.message or "").split())
    return Ending(node, terminated.exit_code, terminated.reason or "", message, terminated.finished_at or _UNKNOWN)


def _why_waiting(pod: Any) -> str:
    state = _container(pod)
    if state and state.waiting and state.waiting.reason not in (None, "ContainerCreating", "PodInitializing"):
        return f"{state.waiting.reason}: {state.waiting.message or pod.metadata.name}"
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{condition.reason}: {condition.message}"
    return ""
