"""A double of Kubernetes' API with what Kubeflow Trainer, JobSet and Kueue do to a TrainJob, as tests tell it to.

TrainJobs are compared with their CustomResourceDefinition, unknown fields refused. Watches, foreground deletion with
its preconditions, and states of containers are those of Kubernetes' API.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from werkzeug.wrappers import Request, Response

from tests.cluster.faulty_server import json_response
from tests.cluster.kube_api import NAMESPACE, KubeApi, Object, write_kubeconfig

JOBS = "trainjobs"
_QUERIES = {
    "list": {"labelSelector", "fieldSelector", "watch", "resourceVersion", "timeoutSeconds"},
    "log": {"container", "follow", "timestamps", "sinceSeconds"},
}  # fmt: skip


class TrainerApi(KubeApi):
    """The double.

    Attributes:
        changes: (resourceVersion, type, object), what watches see.
        oldest: the first resourceVersion that a watch may begin after; before it, 410 Gone.
        too_old: how many watches were told so, by turns as an answer and as an event.
        cut_watches: how many more watches break before their first event.
        watched_from: the resourceVersion of every watch.
        leaving_seconds: how long the pods of a deleted job take to end.
        posted: every TrainJob that was created.
    """

    account = "tuneloop-launcher"

    def reset(self) -> None:
        super().reset()
        self.changes: list[tuple[int, str, Object]] = []
        self.oldest = self.cut_watches = self.too_old = 0
        self.watched_from: list[str] = []
        self.leaving_seconds = 0.05
        self.posted: list[Object] = []

    def job(self) -> Object:
        """The only TrainJob; waits for it."""
        return self.wait_for(lambda: next((found for (kind, _), found in self.objects.items() if kind == JOBS), None))

    def wait_for(self, condition: Any, seconds: float = 15.0) -> Any:
        """What `condition` gives once it is true."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"waited in vain; requests: {self.requests[-20:]}"
            time.sleep(0.01)
        return found

    def admit(self) -> None:
        """Kueue: quota is reserved."""
        job = self.job()
        job["spec"]["suspend"] = False
        self.set_condition("Suspended", "False", "Resumed")

    def set_condition(self, kind: str, status: str = "True", reason: str = "Because", message: str = "") -> None:
        """Trainer: a condition of the job."""
        job = self.job()
        conditions = [found for found in job.get("status", {}).get("conditions", []) if found["type"] != kind]
        conditions.append(
            {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": self._now()}
        )
        job["status"] = {"conditions": conditions}
        self.changed(job)

    def changed(self, job: Object, kind: str = "MODIFIED") -> None:
        """The job has another resourceVersion now, and watches are told."""
        self._validate(job, NAMESPACE)
        job["metadata"]["resourceVersion"] = self._next()
        self.changes.append((int(job["metadata"]["resourceVersion"]), kind, json.loads(json.dumps(job))))

    def start_node(self, node: int, *lines: str, attempt: int = 0, state: Object | None = None) -> str:
        """JobSet: a pod of the job, running; returns its name."""
        job, pod = self.job()["metadata"]["name"], f"{self.job()['metadata']['name']}-node-0-{node}-{attempt}"
        labels = {
            "jobset.sigs.k8s.io/jobset-name": job, "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": str(node),
        }  # fmt: skip
        self.add_pod(pod, labels, lines=lines)
        self.pods[pod]["metadata"]["uid"] = f"uid-{pod}"
        self._set_state(pod, state or {"running": {"startedAt": self._now()}})
        return pod

    def end_node(self, pod: str, exit_code: int = 0, message: str = "", reason: str = "") -> None:
        """Kubelet: the pod's container has ended."""
        now = datetime.now(UTC).isoformat()
        reason = reason or ("Error" if exit_code else "Completed")
        ended = {"exitCode": exit_code, "reason": reason, "message": message, "finishedAt": now, "startedAt": now}
        self._set_state(pod, {"terminated": ended})
        self.pods[pod]["status"]["phase"] = "Failed" if exit_code else "Succeeded"

    def lose_node(self, pod: str) -> None:
        """The pod is gone."""
        self.logs.pop(pod)
        self.pods.pop(pod)

    def _set_state(self, pod: str, state: Object) -> None:
        status = {"name": "node", "image": "i", "imageID": "i", "ready": True, "restartCount": 0, "state": state}
        self.pods[pod]["status"]["containerStatuses"] = [status]

    def _custom(self, request: Request, plural: str, name: str | None, namespace: str, **kind: str) -> Response:
        if plural != JOBS:
            return super()._custom(request, plural, name, namespace, **kind)
        if name is None and request.args.get("watch"):
            return self._watch(request)
        found = self.objects.get((plural, name or ""))
        if request.method == "DELETE" and found:
            return self._delete(found, request.get_json())
        response = super()._custom(request, plural, name, namespace, **kind)
        if request.method == "POST" and response.status_code == 201:
            job = self.objects[plural, request.get_json()["metadata"]["name"]]
            self.posted.append(json.loads(json.dumps(job)))
            job["metadata"]["uid"] = f"uid-{self._next()}"
            self.changed(job, "ADDED")
            return json_response(job, 201)
        return response

    def _delete(self, job: Object, options: Object) -> Response:
        if set(options) - {"propagationPolicy", "preconditions", "apiVersion", "kind"}:
            self.violations.append(f"DELETE with {options}")
        if options.get("preconditions", {}).get("uid", job["metadata"]["uid"]) != job["metadata"]["uid"]:
            return self.error(409, "the UID in the precondition does not match the UID in record")
        if "deletionTimestamp" not in job["metadata"]:
            assert options["propagationPolicy"] == "Foreground"
            job["metadata"] |= {"deletionTimestamp": self._now(), "finalizers": ["foregroundDeletion"]}
            self.changed(job)
            leave = threading.Thread(target=self._leave, args=(job, self.objects, self.pods), daemon=True)
            leave.start()
        return json_response(job)

    def _leave(self, job: Object, objects: dict[tuple[str, str], Object], pods: dict[str, Object]) -> None:
        """The pods end, and the job is gone; of this test, whose objects they are."""
        time.sleep(self.leaving_seconds)
        name = job["metadata"]["name"]
        for pod in [pod for pod in pods if pod.startswith(name)]:
            pods[pod]["status"]["phase"] = "Failed"
        time.sleep(self.leaving_seconds)
        for pod in [pod for pod in pods if pod.startswith(name)]:
            del pods[pod]
        if self.objects is objects:
            self.changed(job, "DELETED")
        del objects[JOBS, name]

    def _watch(self, request: Request) -> Response:
        self._check_query(request, "list")
        version = request.args["resourceVersion"]
        self.watched_from.append(version)
        if int(version) < self.oldest:
            self.too_old += 1
            if self.too_old % 2:
                return self.error(410, "too old resource version")
            expired = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "code": 410, "reason": "Expired"}
            return Response(f"{json.dumps({'type': 'ERROR', 'object': expired})}\n", content_type="application/json")
        field = re.fullmatch(r"metadata\.name=(.+)", request.args["fieldSelector"])
        assert field
        ends = time.monotonic() + float(request.args["timeoutSeconds"])
        return Response(self._events(field[1], int(version), ends), content_type="application/json")

    def _events(self, name: str, version: int, ends: float) -> Iterator[bytes]:
        yield b""
        while time.monotonic() < ends and time.monotonic() >= self.away_until:
            for number, kind, job in list(self.changes):
                if number > version and job["metadata"]["name"] == name:
                    version = number
                    text = json.dumps({"type": kind, "object": job}).encode() + b"\n"
                    if self.cut_watches:
                        self.cut_watches -= 1
                        yield text[: len(text) // 2]
                        raise ConnectionAbortedError
                    yield text
            time.sleep(0.01)

    def _log(self, request: Request, name: str) -> Iterator[bytes]:
        try:
            yield from super()._log(request, name)
        except KeyError:  # the pod is gone
            return

    def _check_query(self, request: Request, kind: str) -> None:
        self.violations += [f"{request.path}: unknown query {key}" for key in request.args if key not in _QUERIES[kind]]


@functools.cache
def _server() -> TrainerApi:
    return TrainerApi()


@pytest.fixture
def trainer_api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[TrainerApi]:
    """A running double, empty, named by a kubeconfig; what it was asked has to follow the published API."""
    server = _server()
    server.reset()
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "kubeconfig", server.url)))
    yield server
    assert server.violations == []
