"""A double of Kubernetes' API server: custom objects, pods and their logs over dictionaries in memory.

Custom objects are compared with their CustomResourceDefinitions (`crds/`), unknown fields refused; an Argo Workflow's
spec is the `workflowSpec` of a CronWorkflow. Nothing is scheduled: tests say what becomes of an object. `conftest.py`
gives it to this folder's tests.
"""

import functools
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from werkzeug.wrappers import Request, Response

from tests.cluster import rights, schemas
from tests.cluster.faulty_server import FaultyServer, json_response

Object = dict[str, Any]
NAMESPACE = "tuneloop"
_KUBERNETES = "1.34"
_IN_NAMESPACE = r"namespaces/(?P<namespace>[^/]+)"
_CUSTOM = re.compile(rf"/apis/(?P<group>[^/]+)/(?P<version>[^/]+)/{_IN_NAMESPACE}/(?P<plural>[^/]+)(/(?P<name>[^/]+))?")
_PODS = re.compile(rf"/api/v1/{_IN_NAMESPACE}/pods(/(?P<name>[^/]+))?(?P<log>/log)?")
_CORE = re.compile(
    rf"/api/v1/(namespaces/[^/]+|nodes|{_IN_NAMESPACE}/((serviceaccounts|secrets)/[^/]+|resourcequotas|limitranges))"
)
_OF_THE_CLUSTER = re.compile(
    r"/apis/[^/]+/v1[^/]+/(clustertrainingruntimes|clusterqueues|workloadpriorityclasses)/[^/]+"
)
_QUERIES = {
    "list": {"labelSelector", "limit", "continue", "fieldSelector"},
    "log": {"container", "follow", "timestamps", "sinceSeconds"},
}  # fmt: skip


class KubeApi(FaultyServer):
    """The double.

    Attributes:
        account: whose rights, by the manifests, the client is held to.
        objects: (plural, name) -> a custom object.
        pods: name -> a pod.
        logs: pod's name -> its lines so far, each behind its time.
        things: path -> what is there, beside custom objects and pods.
        propagation: (plural, name) of what was deleted -> what becomes of the objects that it owned.
        denied: (verb, resource) that the user may not.
        cut_logs: how many more answers of a log break in the middle of a line.
    """

    account = "tuneloop-submitter"

    def reset(self) -> None:
        super().reset()
        self.objects: dict[tuple[str, str], Object] = {}
        self.pods: dict[str, Object] = {}
        self.logs: dict[str, list[str]] = {}
        self.cut_logs = 0
        self._version = 0
        self.things: dict[str, Object] = {}
        self.denied: set[tuple[str, str]] = set()
        self.propagation: dict[tuple[str, str], str] = {}

    def add_pod(self, name: str, labels: dict[str, str], phase: str = "Running", lines: tuple[str, ...] = ()) -> None:
        """A pod, and what it has written."""
        self._version += 1
        metadata = {"name": name, "namespace": NAMESPACE, "labels": labels, "creationTimestamp": self._now()}
        self.pods[name] = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"phase": phase}}
        self.logs[name] = []
        self.write(name, *lines)

    def write(self, pod: str, *lines: str) -> None:
        """The pod writes lines."""
        for line in lines:
            self._version += 1
            moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")
            self.logs[pod].append(f"{moment}{self._version:03d}Z {line}")

    def error(self, status: int, message: str) -> Response:
        reasons = {401: "Unauthorized", 404: "NotFound", 409: "Conflict", 429: "TooManyRequests"}
        content = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
                   "reason": reasons.get(status, ""), "code": status}  # fmt: skip
        return json_response(content, status)

    def answer(self, request: Request) -> Response:
        self.violations += rights.missing(request, self.account)
        if match := _CUSTOM.fullmatch(request.path):
            return self._custom(request, **match.groupdict())
        if match := _PODS.fullmatch(request.path):
            return self._pod(request, match["name"], bool(match["log"]))
        if request.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews" and request.method == "POST":
            return self._review(request.get_json())
        known = request.path in self.things or _CORE.fullmatch(request.path) or _OF_THE_CLUSTER.fullmatch(request.path)
        if request.method == "GET" and known:
            found = self.things.get(request.path)
            return json_response(found) if found else self.error(404, f"{request.path} not found")
        self.violations.append(f"{request.method} {request.path}: no such path")
        return self.error(404, "the server could not find the requested resource")

    def _review(self, review: Object) -> Response:
        self.violations += [
            f"review: {text}" for text in schemas.problems({"metadata": {"name": "review"}, **review}, _KUBERNETES)
        ]
        asked = review["spec"]["resourceAttributes"]
        allowed = (asked["verb"], asked["resource"]) not in self.denied
        return json_response({**review, "metadata": {}, "status": {"allowed": allowed}}, 201)

    def _custom(self, request: Request, plural: str, name: str | None, namespace: str, **kind: str) -> Response:
        if name is None and request.method == "POST":
            return self._create(plural, namespace, request.get_json())
        if name is None:
            self._check_query(request, "list")
            items = [found for (its, _), found in self.objects.items() if its == plural]
            items = _selected(
                sorted(items, key=lambda one: one["metadata"]["name"]), request.args.get("labelSelector", "")
            )
            most = int(request.args.get("limit") or len(items))  # the rest is behind `continue`
            return json_response({"items": items[:most], "metadata": {"continue": "more"} if items[most:] else {}})
        found = self.objects.get((plural, name))
        if found is None:
            return self.error(404, f'{plural} "{name}" not found')
        if request.method == "DELETE":
            self.propagation[plural, name] = request.args.get("propagationPolicy", "Background")
            del self.objects[plural, name]
            return json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"})
        if request.method == "PATCH":
            if request.content_type != "application/merge-patch+json":  # custom objects know no strategic one
                return self.error(415, f"the body of the request was in an unknown format: {request.content_type}")
            return self._replace(plural, found, _merged(found, request.get_json()))
        if request.method == "PUT":
            return self._replace(plural, found, request.get_json())
        return json_response(found)

    def _create(self, plural: str, namespace: str, body: Object) -> Response:
        name = body["metadata"]["name"]
        self._validate(body, namespace)
        if (plural, name) in self.objects:
            return self.error(409, f'{plural} "{name}" already exists')
        body["metadata"] |= {"creationTimestamp": self._now(), "resourceVersion": self._next(), "uid": f"uid-{name}"}
        self.objects[plural, name] = body
        return json_response(body, 201)

    def _replace(self, plural: str, found: Object, body: Object) -> Response:
        self._validate(body, NAMESPACE)
        if body["metadata"].get("resourceVersion") != found["metadata"]["resourceVersion"]:
            return self.error(409, "the object has been modified; please apply your changes to the latest version")
        created = found["metadata"]["creationTimestamp"]
        body["metadata"] |= {"resourceVersion": self._next(), "creationTimestamp": created}
        self.objects[plural, body["metadata"]["name"]] = body
        return json_response(body)

    def _validate(self, body: Object, namespace: str) -> None:
        if body["metadata"].get("namespace", namespace) != namespace:
            self.violations.append(f"{body['metadata']['name']}: of another namespace")
        checked = body
        if body["kind"] == "Workflow":
            spec = {"schedules": ["0 0 * * *"], "workflowSpec": body["spec"]}
            checked = {**body, "kind": "CronWorkflow", "spec": spec}
        self.violations += [f"{body['kind']}: {text}" for text in schemas.problems(checked, _KUBERNETES)]

    def _pod(self, request: Request, name: str | None, log: bool) -> Response:
        if name is None:
            self._check_query(request, "list")
            items = _selected(list(self.pods.values()), request.args.get("labelSelector", ""))
            return json_response({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
        if name not in self.pods:
            return self.error(404, f'pods "{name}" not found')
        if not log:
            return json_response(self.pods[name])
        self._check_query(request, "log")
        if self.pods[name]["status"]["phase"] == "Pending":
            return self.error(400, f'container "main" in pod "{name}" is waiting to start: ContainerCreating')
        return Response(self._log(request, name), content_type="text/plain")

    def _log(self, request: Request, name: str) -> Iterator[bytes]:
        follow, sent = request.args.get("follow") in ("true", "True"), 0
        while True:
            lines = self.logs[name][sent:]
            for number, line in enumerate(lines):
                if self.cut_logs and number == len(lines) // 2:
                    self.cut_logs -= 1
                    yield line[: len(line) // 2].encode()
                    raise ConnectionAbortedError
                yield f"{line}\n".encode()
            sent += len(lines)
            if not follow or self.pods[name]["status"]["phase"] in ("Succeeded", "Failed"):
                return
            time.sleep(0.02)

    def _check_query(self, request: Request, kind: str) -> None:
        self.violations += [f"{request.path}: unknown query {key}" for key in request.args if key not in _QUERIES[kind]]

    def _next(self) -> str:
        self._version += 1
        return str(self._version)

    def _now(self) -> str:
        return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _merged(found: Any, change: Any) -> Any:
    """RFC 7396, without removals."""
    if not isinstance(change, dict):
        return change
    return {**found, **{key: _merged(found.get(key, {}), value) for key, value in change.items()}}


def _selected(items: list[Object], selector: str) -> list[Object]:
    """Equality and existence, as `a=b,c`."""
    for requirement in filter(None, selector.split(",")):
        key, equals, value = requirement.partition("=")
        items = [item for item in items if key in (its := item["metadata"].get("labels") or {})
                 and (not equals or its[key] == value)]  # fmt: skip
    return items


@functools.cache
def _server() -> KubeApi:
    return KubeApi()


def write_kubeconfig(path: Path, url: str, token: str = "") -> Path:
    """A kubeconfig with one context, `here`."""
    user = {"token": token} if token else {}
    content = {
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": url}}],
        "users": [{"name": "me", "user": user}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": NAMESPACE}}],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def kube_api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[KubeApi]:
    """A running double, empty, named by a kubeconfig; what it was asked has to follow the published API."""
    server = _server()
    server.reset()
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "kubeconfig", server.url)))
    yield server
    assert server.violations == []
