"""Runs on Argo Workflows: the WorkflowTemplate created or replaced, the Workflow created from it under the run's name.

A Workflow's name cannot be used twice, so a run that is started again is the Workflow `<run>-r2`, `<run>-r3`, …; the
label `app.kubernetes.io/instance` holds the run's name.
"""

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from components.api_calls import TIMEOUT_SECONDS, Refused
from pipelines.argo.objects import API_VERSION, argo_objects, workflow
from pipelines.cluster.connection import KubeConnection
from pipelines.cluster.run_view import (
    CANCELLED,
    FAILED,
    NODES,
    PAUSED,
    PENDING,
    RUNNING,
    SKIPPED,
    SUCCEEDED,
    RunView,
    StepView,
)
from pipelines.cluster.submission import Submission
from pipelines.cluster.undo import Undo, undone_on_failure
from pipelines.placement import PART_OF_LABEL
from tuneloop.errors import TryAgain, UserError

RUN_LABEL = "app.kubernetes.io/instance"
WORKFLOW_LABEL = "workflows.argoproj.io/workflow"  # Argo's own, on every pod of a Workflow
TEMPLATES, WORKFLOWS = "workflowtemplates", "workflows"
_GROUP, _, _VERSION = API_VERSION.partition("/")
_MOST_CONFLICTS = 10
_PAGE = 500
_PHASES = {
    "": PENDING,
    "Pending": PENDING,
    "Running": RUNNING,
    "Succeeded": SUCCEEDED,
    "Failed": FAILED,
    "Error": FAILED,
    "Skipped": SKIPPED,
    "Omitted": SKIPPED,
}

Object = dict[str, Any]


class ArgoRuns:
    """Argo Workflows as a `Backend`.

    Args:
        ui: URL of Argo's console; empty: links are commands.
    """

    target = "argo"

    def __init__(self, connection: KubeConnection, ui: str = ""):
        self._connection, self._server, self._ui = connection, connection.server, ui.rstrip("/")
        self.pod_namespace = connection.namespace

    def start(self, wanted: Submission, after: RunView | None) -> RunView:
        """Start a run; what was made or replaced for it is put back when it cannot be started.

        Args:
            after: the run of this name that has failed before.

        Raises:
            UserError: the server refuses.
            TryAgain: it is away.
        """
        [template] = [found for found in argo_objects(wanted.config) if found["kind"] == "WorkflowTemplate"]
        with undone_on_failure(self._server) as undo:
            self._ensure_template(template, undo)
            return self._ensure_workflow(wanted, after, undo)

    def find(self, run: str) -> RunView | None:
        """The newest Workflow of a run, or the Workflow of that name."""
        named = self._server.call(lambda: self._of_run(run))
        found = named or self._server.call(lambda: self._server.absent_as_none(lambda: self._get(WORKFLOWS, run)))
        return _view(found) if found else None

    def refresh(self, run: RunView) -> RunView:
        """The run as it is now."""
        return _view(self._server.call(lambda: self._get(WORKFLOWS, run.id)))

    def newest(self, count: int) -> list[RunView]:
        """The newest runs, without their steps."""
        found = self._server.call(lambda: self._list(f"{PART_OF_LABEL}=tuneloop"))
        return [_view(one) for one in found[:count]]

    def link(self, run: RunView) -> str:
        """The run's page in Argo's console."""
        namespace = self._connection.namespace
        if self._ui:
            return f"{self._ui}/workflows/{namespace}/{run.id}"
        return f"kubectl --namespace {namespace} get workflow {run.id} (--ui-host URL for a link to Argo's console)"

    def pod_labels(self, run: RunView) -> str:
        """What Argo labels a Workflow's pods with."""
        return f"{WORKFLOW_LABEL}={run.id}"

    def _ensure_template(self, wanted: Object, undo: Undo) -> None:
        name = wanted["metadata"]["name"]

        def get() -> Object | None:
            return self._server.absent_as_none(lambda: self._get(TEMPLATES, name))

        what = f"WorkflowTemplate {name}"
        found, made = undo.ensure(
            what, get, lambda: self._create(TEMPLATES, wanted), lambda _: self._delete(TEMPLATES, name)
        )
        if not made and found["metadata"].get("labels", {}).get(PART_OF_LABEL) != "tuneloop":
            raise UserError(f"{what}: is somebody else's; give the config another name")
        if not made and not _is_like(found, wanted):
            undo.on_failure(what, lambda: self._replace(_sendable(found), None, get))
            self._replace(wanted, found, get)
        how = "created" if made else "as it is there already" if _is_like(found, wanted) else "replaced"
        print(f"pipeline: {what}, {how}", flush=True)

    def _replace(self, wanted: Object, found: Object | None, get: Callable[[], Object | None]) -> None:
        """Replace an object that somebody may be replacing too.

        Args:
            found: as it was read; None: read it.
        """
        for _ in range(_MOST_CONFLICTS):
            found = found or self._server.call(get)
            if found is None or _is_like(found, wanted):
                return
            version = {"resourceVersion": found["metadata"]["resourceVersion"]}
            body = {**wanted, "metadata": {**wanted["metadata"], **version}}
            try:
                self._server.call(lambda body=body: self._put(TEMPLATES, body))
                return
            except Refused as error:
                if error.status != 409:
                    raise
                found = None
        raise TryAgain(f"WorkflowTemplate {wanted['metadata']['name']}: others are replacing it at the same time")

    def _ensure_workflow(self, wanted: Submission, after: RunView | None, undo: Undo) -> RunView:
        body = workflow(wanted.config, _next_name(wanted.name, after), wanted.arguments)
        body["metadata"]["labels"] = {**body["metadata"]["labels"], RUN_LABEL: wanted.name}

        def find() -> Object | None:
            found = self._of_run(wanted.name)
            return None if found is None or (after and found["metadata"]["name"] == after.id) else found

        run, _ = undo.ensure(
            f"Workflow {body['metadata']['name']}",
            find,
            lambda: self._create(WORKFLOWS, body),
            lambda found: self._delete(WORKFLOWS, found["metadata"]["name"]),
        )
        return _view(run)

    def _of_run(self, name: str) -> Object | None:
        return next(iter(self._list(f"{RUN_LABEL}={name}")), None)

    def _list(self, labels: str) -> list[Object]:
        """Workflows, the newest first."""
        answer = self._connection.custom.list_namespaced_custom_object(
            *self._place(WORKFLOWS), label_selector=labels, limit=_PAGE, _request_timeout=TIMEOUT_SECONDS
        )
        return sorted(answer["items"], key=_made_at, reverse=True)

    def _get(self, plural: str, name: str) -> Object:
        return self._connection.custom.get_namespaced_custom_object(
            *self._place(plural), name, _request_timeout=TIMEOUT_SECONDS
        )

    def _create(self, plural: str, body: Object) -> Object:
        return self._connection.custom.create_namespaced_custom_object(
            *self._place(plural), body, _request_timeout=TIMEOUT_SECONDS
        )

    def _put(self, plural: str, body: Object) -> Object:
        return self._connection.custom.replace_namespaced_custom_object(
            *self._place(plural), body["metadata"]["name"], body, _request_timeout=TIMEOUT_SECONDS
        )

    def _delete(self, plural: str, name: str) -> Object:
        return self._connection.custom.delete_namespaced_custom_object(
            *self._place(plural), name, _request_timeout=TIMEOUT_SECONDS
        )

    def _place(self, plural: str) -> tuple[str, str, str, str]:
        return _GROUP, _VERSION, self._connection.namespace, plural


def _is_like(found: Object, wanted: Object) -> bool:
    """Whether an object on the server is the one that is wanted, whatever the server has added to its metadata."""
    for part in ("labels", "annotations"):
        its = found["metadata"].get(part) or {}
        if not (wanted["metadata"].get(part) or {}).items() <= its.items():
            return False
    return found["spec"] == wanted["spec"]


def _sendable(found: Object) -> Object:
    """An object that was read, as it is sent back."""
    kept = ("name", "namespace", "labels", "annotations")
    return {**found, "metadata": {key: found["metadata"][key] for key in kept if key in found["metadata"]}}


def _next_name(run: str, after: RunView | None) -> str:
    """The Workflow of the next attempt."""
    if after is None:
        return run
    attempt = re.fullmatch(rf"{re.escape(run)}-r(\d+)", after.id)
    return f"{run}-r{int(attempt[1]) + 1 if attempt else 2}"


def _made_at(found: Object) -> tuple[str, int, str]:
    name = found["metadata"]["name"]  # times are of whole seconds
    return found["metadata"].get("creationTimestamp", ""), len(name), name


def _view(found: Object) -> RunView:
    spec, status = found.get("spec") or {}, found.get("status") or {}
    state = _PHASES.get(status.get("phase") or "", PENDING)
    if state == FAILED and spec.get("shutdown"):
        state = CANCELLED
    elif state in (PENDING, RUNNING) and spec.get("suspend"):
        state = PAUSED
    parameters = (spec.get("arguments") or {}).get("parameters") or []
    return RunView(
        id=found["metadata"]["name"],
        name=(found["metadata"].get("labels") or {}).get(RUN_LABEL) or found["metadata"]["name"],
        state=state,
        created=_moment(found["metadata"].get("creationTimestamp")),
        ended=_moment(status.get("finishedAt")),
        steps=_steps(status.get("nodes") or {}),
        parameters={one["name"]: one.get("value", "") for one in parameters},
        message=status.get("message") or "",
    )


def _steps(nodes: Mapping[str, Object]) -> dict[str, StepView]:
    """The steps among a Workflow's nodes: of one that is retried, the node of all its attempts."""
    found = {}
    for node in nodes.values():
        name = node.get("displayName", "").replace("-", "_")
        if name in NODES and node.get("type") in ("Pod", "Retry", "Skipped"):
            state = _PHASES.get(node.get("phase") or "", PENDING)
            began, ended = _moment(node.get("startedAt")), _moment(node.get("finishedAt"))
            found[name] = StepView(state, began, ended, node.get("message") or "")
    return found


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None
