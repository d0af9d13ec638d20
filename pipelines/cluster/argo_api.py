"""Argo's objects through Kubernetes' API."""

from collections.abc import Callable
from typing import Any

from components.api_calls import TIMEOUT_SECONDS, Refused
from pipelines.argo.objects import API_VERSION
from pipelines.cluster.connection import KubeConnection
from pipelines.cluster.undo import Undo
from pipelines.placement import PART_OF_LABEL
from tuneloop.errors import TryAgain, UserError

TEMPLATES, WORKFLOWS, CRON_WORKFLOWS = "workflowtemplates", "workflows", "cronworkflows"
_GROUP, _, _VERSION = API_VERSION.partition("/")
_MOST_CONFLICTS = 10

Object = dict[str, Any]


class ArgoApi:
    """Calls of one attempt each, but for `ensure_template` and `replace`, which have patience."""

    def __init__(self, connection: KubeConnection):
        self.connection, self._server = connection, connection.server

    def ensure_template(self, wanted: Object, undo: Undo) -> None:
        """Have the WorkflowTemplate there as it is wanted; `undo` puts back what was there before."""
        name = wanted["metadata"]["name"]

        def get() -> Object | None:
            return self._server.absent_as_none(lambda: self.get(TEMPLATES, name))

        what = f"WorkflowTemplate {name}"
        found, made = undo.ensure(
            what, get, lambda: self.create(TEMPLATES, wanted), lambda _: self.delete(TEMPLATES, name)
        )
        if not made and found["metadata"].get("labels", {}).get(PART_OF_LABEL) != "tuneloop":
            raise UserError(f"{what}: is somebody else's; give the config another name")
        if not made and not is_like(found, wanted):
            undo.on_failure(what, lambda: self.replace(TEMPLATES, _sendable(found), None, get))
            self.replace(TEMPLATES, wanted, found, get)
        how = "created" if made else "as it is there already" if is_like(found, wanted) else "replaced"
        print(f"pipeline: {what}, {how}", flush=True)

    def replace(self, plural: str, wanted: Object, found: Object | None, get: Callable[[], Object | None]) -> None:
        """Replace an object that somebody may be replacing too.

        Args:
            found: as it was read; None: read it.
        """
        for _ in range(_MOST_CONFLICTS):
            found = found or self._server.call(get)
            if found is None or is_like(found, wanted):
                return
            version = {"resourceVersion": found["metadata"]["resourceVersion"]}
            body = {**wanted, "metadata": {**wanted["metadata"], **version}}
            try:
                self._server.call(lambda body=body: self.put(plural, body))
                return
            except Refused as error:
                if error.status != 409:
                    raise
                found = None
        raise TryAgain(f"{wanted['kind']} {wanted['metadata']['name']}: others are replacing it at the same time")

    def list(self, plural: str, labels: str) -> list[Object]:
        """Those with the labels."""
        answer = self.connection.custom.list_namespaced_custom_object(
            *self._place(plural), label_selector=labels, _request_timeout=TIMEOUT_SECONDS
        )
        return answer["items"]

    def get(self, plural: str, name: str) -> Object:
        """One of them."""
        return self.connection.custom.get_namespaced_custom_object(
            *self._place(plural), name, _request_timeout=TIMEOUT_SECONDS
        )

    def create(self, plural: str, body: Object) -> Object:
        """Make one."""
        return self.connection.custom.create_namespaced_custom_object(
            *self._place(plural), body, _request_timeout=TIMEOUT_SECONDS
        )

    def put(self, plural: str, body: Object) -> Object:
        """Put one in place of the one of its name and version."""
        return self.connection.custom.replace_namespaced_custom_object(
            *self._place(plural), body["metadata"]["name"], body, _request_timeout=TIMEOUT_SECONDS
        )

    def patch(self, plural: str, name: str, change: Object) -> Object:
        """Change one by a JSON merge patch (RFC 7396), the only patch of a mapping that custom objects take."""
        return self.connection.custom.patch_namespaced_custom_object(
            *self._place(plural), name, change, _request_timeout=TIMEOUT_SECONDS
        )

    def delete(self, plural: str, name: str, propagation: str = "Background") -> Object:
        """Remove one, and what it owns unless `propagation` is "Orphan"."""
        return self.connection.custom.delete_namespaced_custom_object(
            *self._place(plural), name, propagation_policy=propagation, _request_timeout=TIMEOUT_SECONDS
        )

    def _place(self, plural: str) -> tuple[str, str, str, str]:
        return _GROUP, _VERSION, self.connection.namespace, plural


def is_like(found: Object, wanted: Object) -> bool:
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
