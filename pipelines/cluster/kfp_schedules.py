"""Schedules on Kubeflow Pipelines: recurring runs.

Its API cannot change a recurring run, so a changed schedule is made anew, disabled; then the old one is removed and the
new one enabled. Kubeflow knows no time zones: it reads cron in its controller's, UTC unless `CRON_SCHEDULE_TIMEZONE` is
set there.
"""

from collections.abc import Sequence
from typing import Any

from components.api_calls import TIMEOUT_SECONDS
from components.cron import with_seconds
from components.node import TICK
from pipelines.cluster.connection import KfpConnection
from pipelines.cluster.kfp_pipelines import ensure_pipeline, in_namespace, version_name
from pipelines.cluster.schedules import Declared, Existing, digest_of
from pipelines.cluster.undo import Undo, undone_on_failure
from pipelines.kfp_rendering import config_text, kubernetes_package
from tuneloop.errors import UserError

UTC_NAMES = ("UTC", "Etc/UTC", "Etc/GMT", "GMT")
_PAGE = 100
_MARK = "tuneloop schedule of "


class KfpSchedules:
    """The `Schedules` of Kubeflow Pipelines.

    Args:
        server_timezone: in which its controller reads cron.
    """

    def __init__(self, connection: KfpConnection, server_timezone: str = "UTC"):
        self._api, self._server = connection, connection.server
        self._timezone = server_timezone

    def digest(self, declared: Declared) -> str:
        """Of the pipeline's version and everything that the recurring run says."""
        if not _same_zone(declared.timezone, self._timezone):
            raise UserError(
                f"{declared.name}: cluster.schedule.timezone = {declared.timezone}, but Kubeflow Pipelines reads cron "
                f"in its own time zone, {self._timezone}: write the times in that, name the zone that its controller's "
                "CRON_SCHEDULE_TIMEZONE has with --server-timezone, or use --target argo"
            )
        if len(declared.cron) > 1:
            raise UserError(
                f"{declared.name}: cluster.schedule.schedules has {len(declared.cron)} expressions; on Kubeflow "
                "Pipelines each would be a recurring run of its own, and their ticks would overlap: write one, such as "
                "0 3,15 * * *, or use --target argo"
            )
        version = version_name(declared.config, kubernetes_package(declared.config))
        return digest_of([version, self._body(declared)])

    def existing(self, owner: str) -> list[Existing]:
        """Several of a name are there while one is being replaced."""
        found = []
        for run in self._all():
            its_owner, _, digest = (run.description or "").removeprefix(_MARK).partition(": ")
            if (run.description or "").startswith(_MARK) and its_owner == owner:
                cron = _cron(run).partition(" ")[2]
                found.append(Existing(run.recurring_run_id, run.display_name, digest, not _is_enabled(run), (cron,)))
        return found

    def create(self, declared: Declared) -> None:
        """Make its recurring run; what was made is taken back when that fails."""
        with undone_on_failure(self._server) as undo:
            made = self._make(declared, undo)
        if not declared.paused:
            self._enable(made, True)

    def replace(self, existing: Sequence[Existing], declared: Declared) -> None:
        """Make the new one, disabled, remove the old ones, enable the new one."""
        with undone_on_failure(self._server) as undo:
            made = self._make(declared, undo)
        for one in existing:
            if one.id != made:
                self.delete(one)
        self._enable(made, not declared.paused)

    def pause(self, existing: Existing, paused: bool) -> None:
        """Disable or enable its recurring run."""
        self._enable(existing.id, not paused)

    def delete(self, existing: Existing) -> None:
        """Remove its recurring run."""
        self._server.call(lambda: self._server.absent_as_none(lambda: self._remove(existing.id)))

    def _make(self, declared: Declared, undo: Undo) -> str:
        """The id of the schedule's recurring run, which may be there already; a new one is disabled."""
        pipeline = ensure_pipeline(self._api, declared.config, undo)
        body = {
            **self._body(declared),
            "description": f"{_MARK}{declared.owner}: {self.digest(declared)}",
            "mode": "DISABLE",
            "experiment_id": pipeline.experiment_id,
            "pipeline_version_reference": pipeline.reference,
        }
        run, _ = undo.ensure(
            f"recurring run {declared.name}",
            lambda: next((run for run in self._all_once() if run.description == body["description"]
                          and run.display_name == declared.name), None),
            lambda: self._api.client.recurring_runs.recurring_run_service_create_recurring_run(
                body, _request_timeout=TIMEOUT_SECONDS
            ),
            lambda found: self._remove(found.recurring_run_id),
        )  # fmt: skip
        return run.recurring_run_id

    def _body(self, declared: Declared) -> dict[str, Any]:
        """A recurring run, without what only the server knows."""
        parameters = {
            "config": config_text(declared.config),
            "output_uri": f"{declared.runs_uri}/{declared.name}-{TICK}",
        }
        body: dict[str, Any] = {
            "display_name": declared.name,
            "max_concurrency": "1",  # a tick that is still at work holds back the next one
            "no_catchup": True,
            "trigger": {"cron_schedule": {"cron": with_seconds(declared.cron[0])}},
            "runtime_config": {"parameters": parameters},
        }
        if declared.config.cluster.service_account:
            body["service_account"] = declared.config.cluster.service_account
        return body

    def _all(self) -> list[Any]:
        return self._server.call(self._all_once)

    def _all_once(self) -> list[Any]:
        found, token = [], ""
        while True:
            answer = self._api.client.recurring_runs.recurring_run_service_list_recurring_runs(
                **in_namespace(self._api), page_size=_PAGE, page_token=token, _request_timeout=TIMEOUT_SECONDS
            )
            found += answer.recurring_runs or []
            token = answer.next_page_token or ""
            if not token:
                return found

    def _enable(self, identity: str, enabled: bool) -> None:
        api = self._api.client.recurring_runs
        call = api.recurring_run_service_enable_recurring_run if enabled else (
            api.recurring_run_service_disable_recurring_run
        )  # fmt: skip
        self._server.call(lambda: call(identity, _request_timeout=TIMEOUT_SECONDS))

    def _remove(self, identity: str) -> Any:
        return self._api.client.recurring_runs.recurring_run_service_delete_recurring_run(
            identity,
            propagation_policy="ORPHAN",  # else Kubernetes ends the ticks that are at work, which it owns
            _request_timeout=TIMEOUT_SECONDS,
        )


def _is_enabled(run: Any) -> bool:
    """By its status, which is unspecified until Kubeflow's controller has seen the recurring run."""
    if run.status in ("ENABLED", "DISABLED"):
        return run.status == "ENABLED"
    return run.mode == "ENABLE"


def _cron(run: Any) -> str:
    schedule = run.trigger.cron_schedule if run.trigger else None
    return (schedule.cron or "") if schedule else ""


def _same_zone(one: str, other: str) -> bool:
    return one == other or (one in UTC_NAMES and other in UTC_NAMES)
