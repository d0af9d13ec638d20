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
from tuneloop.errors import EXIT_TRY_AGAIN, EXIT_USER_ERROR, TuneloopError

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
        lost: the cluster took the pod away: its node is gone, drained or out of room.
    """

    node: str
    exit_code: int
    reason: str
    message: str
    at: datetime
    lost: bool = False


class Pods:
    """While entered, follows the pods of a job in threads of its own.

    Attributes:
        running: whether the containers of as many pods as there are nodes run.
        waiting: why a pod does not start, in a few words.
        endings: how containers ended, by their pod's uid.
    """

    def __init__(self, api: TrainJobApi, name: str, nodes: int):
        self._api, self._name, self._nodes = api, name, nodes
        self.running, self.waiting = False, ""
        self.endings: dict[str, Ending] = {}
        self._logs: dict[str, threading.Thread] = {}
        self._leaving, self._closed = threading.Event(), False
        self._printing, self._noting = threading.Lock(), threading.Lock()
        self._warned = set[str]()
        self._thread = threading.Thread(target=self._run, name="pods", daemon=True)

    def __enter__(self) -> "Pods":
        self.look()  # what is not allowed is said here, and not when a running job seems never to start
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
            Refused: pods may not be seen.
            TryAgain: the server is away.
        """
        found = self._api.pods(self._name)
        with self._noting:  # a pod is followed once, whichever thread sees it first
            self._note(found)

    def _note(self, found: list[Any]) -> None:
        containers = {pod.metadata.uid: _container(pod) for pod in found}
        for pod in found:
            state = containers[pod.metadata.uid]
            if ending := _ending(pod, state):
                self.endings[pod.metadata.uid] = ending
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
            sys.stdout.write(f"node {node} | {line}\n")  # in one piece: the launcher prints too
            sys.stdout.flush()

    def _patiently(self, action: Any) -> Any:
        """`action`'s result; None when the server is away, which is said and no reason to stop looking."""
        try:
            return action()
        except TuneloopError as error:
            text = f"warning: the pods of {self._name} cannot be seen: {error}"
            with self._printing:
                if text not in self._warned:  # a node that is lost answers like this until its pods are taken away
                    print(text, file=sys.stderr, flush=True)
                self._warned.add(text)
            return None


def _node(pod: Any) -> str:
    return (pod.metadata.labels or {}).get(INDEX_LABEL, "?")


def _container(pod: Any) -> Any:
    """The state of the container that trains; None before there is one."""
    statuses = pod.status.container_statuses or []
    return next((status.state for status in statuses if status.name == NODE), None)


def _ending(pod: Any, state: Any) -> Ending | None:
    """How the pod's container ended; None when it has not.

    A pod that the cluster takes away may never say how its container ended, and what it says (137) is no bug:
    https://kubernetes.io/docs/concepts/workloads/pods/disruptions/#pod-disruption-conditions.
    """
    ended = state.terminated if state else None
    taken = next((found for found in pod.status.conditions or [] if found.type == "DisruptionTarget"), None)
    if taken and taken.status == "True" and not (ended and ended.exit_code == EXIT_USER_ERROR):
        at = taken.last_transition_time or _UNKNOWN
        return Ending(_node(pod), EXIT_TRY_AGAIN, taken.reason or "", _in_one_line(taken.message), at, lost=True)
    if not ended:
        return None
    at = ended.finished_at or _UNKNOWN
    return Ending(_node(pod), ended.exit_code, ended.reason or "", _in_one_line(ended.message), at)


def _why_waiting(pod: Any) -> str:
    state = _container(pod)
    if state and state.waiting and state.waiting.reason not in (None, "ContainerCreating", "PodInitializing"):
        return f"{state.waiting.reason}: {_in_one_line(state.waiting.message) or pod.metadata.name}"
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{condition.reason}: {_in_one_line(condition.message)}"
    return ""


def _in_one_line(text: str | None) -> str:
    return " ".join((text or "").split())
