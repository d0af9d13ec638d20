"""Schedules on Argo Workflows: a CronWorkflow each, with the WorkflowTemplate that its ticks run."""

from collections.abc import Sequence

from pipelines.argo.objects import argo_objects
from pipelines.cluster.argo_api import CRON_WORKFLOWS, ArgoApi, Object
from pipelines.cluster.connection import KubeConnection
from pipelines.cluster.schedules import Declared, Existing, digest_of
from pipelines.cluster.undo import undone_on_failure
from tuneloop.errors import UserError

OWNER_LABEL = "app.kubernetes.io/managed-by"
_MARK = "tuneloop-schedules-"
DIGEST = "tuneloop/digest"  # annotation


class ArgoSchedules:
    """The `Schedules` of Argo Workflows."""

    def __init__(self, connection: KubeConnection):
        self._api, self._server = ArgoApi(connection), connection.server

    def digest(self, declared: Declared) -> str:
        """Of both objects."""
        return digest_of(argo_objects(declared.config))

    def existing(self, owner: str) -> list[Existing]:
        """The CronWorkflows of an owner."""
        return [_existing(one) for one in self._server.call(lambda: self._of(owner))]

    def create(self, declared: Declared) -> None:
        """Make the template, then the CronWorkflow; the first is taken back when the second cannot be made."""
        self.replace((), declared)

    def replace(self, existing: Sequence[Existing], declared: Declared) -> None:
        """Put both in their place; a tick that is under way goes on as it began."""
        template, cron = argo_objects(declared.config)
        name = declared.name
        wanted = {
            **cron,
            "metadata": {
                **cron["metadata"],
                "labels": {**cron["metadata"]["labels"], OWNER_LABEL: _MARK + declared.owner},
                "annotations": {DIGEST: self.digest(declared)},
            },
            "spec": {**cron["spec"], "suspend": declared.paused},
        }

        def get() -> Object | None:
            return self._server.absent_as_none(lambda: self._api.get(CRON_WORKFLOWS, name))

        _require_ours(self._server.call(get), declared)
        with undone_on_failure(self._server) as undo:
            self._api.ensure_template(template, undo)
            found, made = undo.ensure(
                f"CronWorkflow {name}",
                get,
                lambda: self._api.create(CRON_WORKFLOWS, wanted),
                lambda _: self._api.delete(CRON_WORKFLOWS, name),
            )
            if not made:
                self._api.replace(CRON_WORKFLOWS, wanted, found, get)

    def pause(self, existing: Existing, paused: bool) -> None:
        """Set `suspend`, and nothing else of what somebody may be replacing."""
        change = {"spec": {"suspend": paused}}
        self._server.call(
            lambda: self._server.absent_as_none(lambda: self._api.patch(CRON_WORKFLOWS, existing.id, change))
        )

    def delete(self, existing: Existing) -> None:
        """Remove the CronWorkflow; the template stays, because runs may be using it."""
        # Argo's CronWorkflow owns its Workflows, and Kubernetes would end those that are at work.
        self._server.call(
            lambda: self._server.absent_as_none(lambda: self._api.delete(CRON_WORKFLOWS, existing.id, "Orphan"))
        )

    def _of(self, owner: str) -> list[Object]:
        return self._api.list(CRON_WORKFLOWS, f"{OWNER_LABEL}={_MARK}{owner}")


def _require_ours(found: Object | None, declared: Declared) -> None:
    """Refuse to take a CronWorkflow from another owner, or from somebody who made it without this command."""
    owner = ((found or {}).get("metadata", {}).get("labels") or {}).get(OWNER_LABEL, "")
    if found is not None and owner != _MARK + declared.owner:
        whose = f"of {owner.removeprefix(_MARK)}" if owner else "somebody else's"
        raise UserError(f"CronWorkflow {declared.name}: is {whose}; give the config another name")


def _existing(found: Object) -> Existing:
    name = found["metadata"]["name"]
    return Existing(
        id=name,
        name=name,
        digest=(found["metadata"].get("annotations") or {}).get(DIGEST, ""),
        paused=bool(found["spec"].get("suspend")),
        cron=tuple(found["spec"].get("schedules") or ()),
    )
