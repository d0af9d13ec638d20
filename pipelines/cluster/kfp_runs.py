"""Runs on Kubeflow Pipelines (API v2beta1), found by their name."""

import re
from typing import Any

from components.api_calls import TIMEOUT_SECONDS
from pipelines.cluster.connection import KfpConnection
from pipelines.cluster.kfp_pipelines import KfpPipeline, ensure_pipeline, equals, in_namespace
from pipelines.cluster.run_view import (
    CANCELLED,
    CANCELLING,
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
from pipelines.steps import NODES

_PAGE = 100
_RUN_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_STATES = {
    "RUNTIME_STATE_UNSPECIFIED": PENDING,
    "PENDING": PENDING,
    "RUNNING": RUNNING,
    "SUCCEEDED": SUCCEEDED,
    "SKIPPED": SKIPPED,
    "FAILED": FAILED,
    "CANCELING": CANCELLING,
    "CANCELED": CANCELLED,
    "PAUSED": PAUSED,
}


class KfpRuns:
    """Kubeflow Pipelines as a `Backend`."""

    target = "kfp"

    def __init__(self, connection: KfpConnection):
        self._connection, self._server = connection, connection.server
        self.pod_namespace = connection.namespace or connection.kfp_namespace

    def start(self, wanted: Submission, after: RunView | None) -> RunView:
        """Start a run; what was made for it is removed again when it cannot be started.

        Args:
            after: the run of this name that has failed before.

        Raises:
            UserError: the server refuses.
            TryAgain: it is away.
        """
        with undone_on_failure(self._server) as undo:
            return self._ensure_run(wanted, after, ensure_pipeline(self._connection, wanted.config, undo), undo)

    def find(self, run: str) -> RunView | None:
        """The run of that id, or the newest of that name."""
        if _RUN_ID.fullmatch(run):
            found = self._server.call(lambda: self._server.absent_as_none(lambda: self._get(run)))
            return _view(found) if found else None
        named = self._server.call(lambda: self._named(run))
        return self.refresh(_view(named)) if named else None

    def refresh(self, run: RunView) -> RunView:
        """The run as it is now."""
        return _view(self._server.call(lambda: self._get(run.id)))

    def newest(self, count: int) -> list[RunView]:
        """The newest runs, without their steps."""
        answer = self._server.call(
            lambda: self._connection.client.runs.run_service_list_runs(
                **in_namespace(self._connection),
                page_size=count,
                sort_by="created_at desc",
                _request_timeout=TIMEOUT_SECONDS,
            )
        )
        return [_view(run) for run in answer.runs or []]

    def link(self, run: RunView) -> str:
        """The run's page in the console."""
        return run_link(self._connection.ui, run.id, self._connection.kfp_namespace)

    def pod_labels(self, run: RunView) -> str:
        """What Kubeflow Pipelines labels a run's pods with."""
        return f"pipeline/runid={run.id}"

    def _ensure_run(self, wanted: Submission, after: RunView | None, pipeline: KfpPipeline, undo: Undo) -> RunView:
        body = {
            "display_name": wanted.name,
            "experiment_id": pipeline.experiment_id,
            "pipeline_version_reference": pipeline.reference,
            "runtime_config": {"parameters": wanted.arguments},
        }
        if wanted.config.cluster.service_account:  # else Kubeflow's own runs the pods
            body["service_account"] = wanted.config.cluster.service_account

        def find() -> Any:
            found = self._named(wanted.name)
            return None if found is None or (after and found.run_id == after.id) else found

        api = self._connection
        run, _ = undo.ensure(
            f"run {wanted.name}",
            find,
            lambda: api.client.runs.run_service_create_run(body, _request_timeout=TIMEOUT_SECONDS),
            lambda found: api.client.runs.run_service_delete_run(found.run_id, _request_timeout=TIMEOUT_SECONDS),
        )
        return _view(run)

    def _get(self, run_id: str) -> Any:
        return self._connection.client.runs.run_service_get_run(run_id, _request_timeout=TIMEOUT_SECONDS)

    def _named(self, name: str) -> Any:
        """The newest run of a name that nobody has archived."""
        answer = self._connection.client.runs.run_service_list_runs(
            **in_namespace(self._connection),
            filter=equals("display_name", name),
            sort_by="created_at desc",
            page_size=_PAGE,
            _request_timeout=TIMEOUT_SECONDS,
        )
        return next((run for run in answer.runs or [] if run.storage_state != "ARCHIVED"), None)


def run_link(ui: str, run_id: str, kfp_namespace: str) -> str:
    """The run's page in the console at `ui`; empty: how to open one."""
    if ui:
        return f"{ui}/#/runs/details/{run_id}"
    forward = f"kubectl --namespace {kfp_namespace} port-forward service/ml-pipeline-ui 8080:80"
    return f"http://localhost:8080/#/runs/details/{run_id}, after: {forward}"


def _view(run: Any) -> RunView:
    details = (run.run_details.task_details if run.run_details else None) or []
    parameters = (run.runtime_config.parameters if run.runtime_config else None) or {}
    return RunView(
        id=run.run_id,
        name=run.display_name,
        state=_STATES.get(run.state or "PENDING", PENDING),
        created=run.created_at,
        ended=_moment(run.finished_at),
        steps=_steps(details),
        parameters=parameters,
        message=(run.error.message or "") if run.error else "",
    )


def _steps(details: list[Any]) -> dict[str, StepView]:
    """The steps among a run's tasks, which hold its groups and Kubeflow's own helpers too."""
    found: dict[str, StepView] = {}
    for task in sorted(details, key=lambda one: str(one.create_time)):
        name = (task.display_name or "").replace("-", "_")
        if name in NODES:
            message = (task.error.message or "") if task.error else ""
            state = _STATES.get(task.state or "PENDING", PENDING)
            found[name] = StepView(state, _moment(task.start_time), _moment(task.end_time), message)
    return found


def _moment(time: Any) -> Any:
    """A time that has come: the API writes year 0 or 1970 where there is none yet."""
    return time if time is not None and time.year > 1970 else None
