"""Runs on Argo Workflows: Workflows made from a WorkflowTemplate under the run's name.

A Workflow's name cannot be used twice, so a run that is started again is the Workflow `<run>-r2`, `<run>-r3`, …; the
label `app.kubernetes.io/instance` holds the run's name.
"""

import re
from collections.abc import Mapping
from datetime import datetime

from pipelines.argo.objects import argo_objects, workflow
from pipelines.cluster.argo_api import WORKFLOWS, ArgoApi, Object
from pipelines.cluster.connection import KubeConnection
from pipelines.cluster.run_view import (
    CANCELLED,
    FAILED,
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
from pipelines.steps import NODES

RUN_LABEL = "app.kubernetes.io/instance"
WORKFLOW_LABEL = "workflows.argoproj.io/workflow"  # Argo's own, on every pod of a Workflow
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


class ArgoRuns:
    """Argo Workflows as a `Backend`.

    Args:
        ui: URL of Argo's console; empty: links are commands.
    """

    target = "argo"

    def __init__(self, connection: KubeConnection, ui: str = ""):
        self._connection, self._server, self._ui = connection, connection.server, ui.rstrip("/")
        self._api = ArgoApi(connection)
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
            self._api.ensure_template(template, undo)
            return self._ensure_workflow(wanted, after, undo)

    def find(self, run: str) -> RunView | None:
        """The newest Workflow of a run, or the Workflow of that name."""
        named = self._server.call(lambda: self._of_run(run))
        found = named or self._server.call(lambda: self._server.absent_as_none(lambda: self._api.get(WORKFLOWS, run)))
        return _view(found) if found else None

    def refresh(self, run: RunView) -> RunView:
        """The run as it is now."""
        return _view(self._server.call(lambda: self._api.get(WORKFLOWS, run.id)))

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

    def _ensure_workflow(self, wanted: Submission, after: RunView | None, undo: Undo) -> RunView:
        body = workflow(wanted.config, _next_name(wanted.name, after), wanted.arguments)
        body["metadata"]["labels"] = {**body["metadata"]["labels"], RUN_LABEL: wanted.name}

        def find() -> Object | None:
            found = self._of_run(wanted.name)
            return None if found is None or (after and found["metadata"]["name"] == after.id) else found

        run, _ = undo.ensure(
            f"Workflow {body['metadata']['name']}",
            find,
            lambda: self._api.create(WORKFLOWS, body),
            lambda found: self._api.delete(WORKFLOWS, found["metadata"]["name"]),
        )
        return _view(run)

    def _of_run(self, name: str) -> Object | None:
        return next(iter(self._list(f"{RUN_LABEL}={name}")), None)

    def _list(self, labels: str) -> list[Object]:
        """Workflows, the newest first."""
        return sorted(self._api.list(WORKFLOWS, labels), key=_made_at, reverse=True)


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
