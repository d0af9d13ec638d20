"""The log of a run's steps, from their pods: printed once, or followed through dropped connections."""

import time
from datetime import UTC, datetime
from typing import Any, TextIO

from components.api_calls import TIMEOUT_SECONDS, Refused
from pipelines.cluster.connection import KubeConnection
from pipelines.cluster.run_view import Backend, RunView
from pipelines.placement import STEP_LABEL
from tuneloop.errors import UserError

POLL_SECONDS = 2.0
_CONTAINER = "main"  # where Argo and Kubeflow run the step; the others are their own
_QUIET_SECONDS = 300.0  # of a log, after which the connection is made anew
_OVERLAP_SECONDS = 5  # read again after a reconnection; lines are known by their time
_ENDED = ("Succeeded", "Failed")


def print_logs(
    kube: KubeConnection, backend: Backend, run: RunView, step: str | None, follow: bool, stream: TextIO
) -> None:
    """Print the logs of a run's pods, in the order in which they were started.

    Args:
        step: only of this step; None: of all.
        follow: go on until the run has ended.

    Raises:
        UserError: there are no pods.
        TryAgain: the server is away.
    """
    reader = _LogReader(kube, backend.pod_namespace, stream)
    labels = f"{backend.pod_labels(run)},{STEP_LABEL}" + (f"={step}" if step else "")
    shown: set[str] = set()
    while True:
        run = backend.refresh(run)
        pods = [pod for pod in reader.pods(labels) if pod.metadata.name not in shown]
        for pod in pods:
            reader.print_pod(pod, follow)
            shown.add(pod.metadata.name)
        if not follow or (run.has_ended and not pods) or (step and shown and _step_has_ended(run, step) and not pods):
            break
        if not pods:
            time.sleep(POLL_SECONDS)
    if not shown:
        of = f"step {step} of {run.name}" if step else run.name
        raise UserError(f"{of}: has no pods in {backend.pod_namespace}: it has not begun (--follow waits), or they are "
                        f"removed; see the console: {backend.link(run)}")  # fmt: skip


def _step_has_ended(run: RunView, step: str) -> bool:
    return step in run.steps and run.steps[step].ended is not None


class _LogReader:
    def __init__(self, kube: KubeConnection, namespace: str, stream: TextIO):
        self._kube, self._namespace, self._stream = kube, namespace, stream

    def pods(self, labels: str) -> list[Any]:
        """Pods with these labels, the oldest first."""
        answer = self._kube.server.call(
            lambda: self._kube.core.list_namespaced_pod(
                self._namespace, label_selector=labels, _request_timeout=TIMEOUT_SECONDS
            )
        )
        return sorted(answer.items, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))

    def print_pod(self, pod: Any, follow: bool) -> None:
        """Print a pod's log, each line behind its step's name."""
        step, name = pod.metadata.labels[STEP_LABEL], pod.metadata.name
        self._stream.write(f"── {step} ({name}) {'─' * max(2, 72 - len(step) - len(name))}\n")
        printed = _Printed(self._stream, step)
        while True:
            ended = self._phase(name) in _ENDED  # before the log is read: what it writes last is read too
            whole = self._read(name, follow, printed)
            if whole and (ended or not follow):
                return
            time.sleep(POLL_SECONDS)

    def _read(self, name: str, follow: bool, printed: "_Printed") -> bool:
        """Print what the log holds; False when the connection broke before its end."""
        import urllib3

        response = self._open(name, follow, printed.since())
        if response is None:
            return True
        rest = b""
        try:
            for piece in response.stream():
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    printed.take(line.decode(errors="replace"))
        except urllib3.exceptions.HTTPError:
            return False  # a line that was cut off comes whole with the next connection
        finally:
            response.close()
        if rest:
            printed.take(rest.decode(errors="replace"))
        return True

    def _open(self, name: str, follow: bool, since: dict[str, int]) -> Any:
        """The pod's log as a stream; None when it has none, or none yet."""
        try:
            return self._kube.server.call(
                lambda: self._kube.core.read_namespaced_pod_log(
                    name,
                    self._namespace,
                    container=_CONTAINER,
                    follow=follow,
                    timestamps=True,
                    _preload_content=False,
                    _request_timeout=(TIMEOUT_SECONDS[0], _QUIET_SECONDS),
                    **since,
                )
            )
        except Refused as error:
            if error.status in (400, 404):  # its container has not started, or the pod is removed
                return None
            raise

    def _phase(self, name: str) -> str:
        """The pod's phase; one that is removed has ended."""
        server = self._kube.server
        pod = server.call(
            lambda: server.absent_as_none(
                lambda: self._kube.core.read_namespaced_pod(name, self._namespace, _request_timeout=TIMEOUT_SECONDS)
            )
        )
        return pod.status.phase if pod else _ENDED[0]


class _Printed:
    """Prints each line of a log once, however often it is read; every line begins with its time."""

    def __init__(self, stream: TextIO, step: str):
        self._stream, self._step = stream, step
        self._last, self._at_last = "", set()

    def take(self, line: str) -> None:
        """Print a line, unless it was printed before."""
        moment, _, text = line.partition(" ")
        if moment < self._last or (moment == self._last and text in self._at_last):
            return
        self._at_last = {text} if moment != self._last else self._at_last | {text}
        self._last = moment
        self._stream.write(f"{self._step} | {text}\n")
        self._stream.flush()

    def since(self) -> dict[str, int]:
        """The API's argument that leaves out most of what was printed: whole seconds until now, and a few more."""
        if not self._last:
            return {}
        then = datetime.fromisoformat(f"{self._last[:19]}+00:00")
        return {"since_seconds": max(1, int((datetime.now(UTC) - then).total_seconds()) + _OVERLAP_SECONDS)}
