"""The log of a run's steps, from their pods: printed once, or followed through dropped connections."""

import time
from typing import Any, TextIO

from components.api_calls import TIMEOUT_SECONDS
from components.pod_log import PodLog
from pipelines.cluster.connection import KubeConnection
from pipelines.cluster.run_view import Backend, RunView
from pipelines.placement import STEP_LABEL
from tuneloop.errors import UserError

POLL_SECONDS = 2.0
_CONTAINER = "main"  # where Argo and Kubeflow run the step; the others are their own
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
        log = PodLog(
            self._kube.server, lambda: self._kube.core, self._namespace, name, _CONTAINER,
            lambda line: self._print(step, line),
        )  # fmt: skip
        while True:
            ended = self._phase(name) in _ENDED  # before the log is read: what it writes last is read too
            whole = log.read(follow)
            if whole and (ended or not follow):
                return
            time.sleep(POLL_SECONDS)

    def _phase(self, name: str) -> str:
        """The pod's phase; one that is removed has ended."""
        server = self._kube.server
        pod = server.call(
            lambda: server.absent_as_none(
                lambda: self._kube.core.read_namespaced_pod(name, self._namespace, _request_timeout=TIMEOUT_SECONDS)
            )
        )
        return pod.status.phase if pod else _ENDED[0]

    def _print(self, step: str, line: str) -> None:
        self._stream.write(f"{step} | {line}\n")
        self._stream.flush()
