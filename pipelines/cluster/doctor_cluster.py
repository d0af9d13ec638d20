"""What `doctor` asks Kubernetes."""

import contextlib
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from components.api_calls import TIMEOUT_SECONDS, Refused
from components.config import RunConfig
from pipelines.cluster.connection import ConnectionSettings, KubeConnection
from pipelines.cluster.doctor_nodes import look_at_nodes
from pipelines.cluster.doctor_quota import Defaults, defaults_of, demands, look_at_cluster_queue, look_at_quotas
from pipelines.cluster.not_checked import NotChecked
from tuneloop.errors import UserError

T = TypeVar("T")

OLDEST_MINOR = 33  # of Kubernetes 1.x: what the manifests are checked against
ARGO, TRAINER, KUEUE = "argoproj.io/v1alpha1", "trainer.kubeflow.org/v1alpha1", "kueue.x-k8s.io/v1beta2"
_ADVICE = {
    ARGO: "install Argo Workflows 4",
    TRAINER: "install Kubeflow Trainer 2.3 or newer",
    KUEUE: "install Kueue with its API v1beta2, or leave [cluster] queue empty",
}


@dataclass(frozen=True)
class Right:
    """What a user has to be allowed in the namespace."""

    verb: str
    resource: str
    group: str = ""
    subresource: str = ""

    def __str__(self) -> str:
        name = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        return f"{self.verb} {name}{'.' + self.group if self.group else ''}"


class ClusterLook:
    """The cluster of a config.

    Attributes:
        cluster_queue: what the local queue takes from; empty before `queue` has found it.

    Raises:
        UserError: no cluster is named, or it does not know the user.
        TryAgain: it is away.
    """

    def __init__(self, config: RunConfig, settings: ConnectionSettings):
        import kubernetes

        self._cluster, self._kube = config.cluster, KubeConnection(settings)
        self._launches = config.lora_rl.distributed
        self._launches_trainjobs = self._launches.launcher == "trainjob"
        self._config = config
        self.cluster_queue = ""
        client = self._kube.core.api_client
        self._version_api: Any = kubernetes.client.VersionApi(client)
        self._apis: Any = kubernetes.client.ApisApi(client)
        self._authorization: Any = kubernetes.client.AuthorizationV1Api(client)

    def version(self) -> str:
        """The server's, if it is new enough."""
        found = self._call(lambda: self._version_api.get_code(_request_timeout=TIMEOUT_SECONDS))
        version = tuple(_leading_number(part) for part in (found.major, found.minor))
        if any(version) and version < (1, OLDEST_MINOR):  # a build of somebody's own may not know its numbers
            raise UserError(
                f"{self._kube.server.name} is version {found.git_version}; 1.{OLDEST_MINOR} or newer is needed"
            )
        return f"{self._kube.server.name}, {found.git_version}"

    def namespace(self) -> str:
        """Whether it is there."""
        name, core = self._cluster.namespace, self._kube.core
        found = self._read(
            f"namespace {name}",
            lambda: core.read_namespace(name, _request_timeout=TIMEOUT_SECONDS),
            "apply manifests/overlays, or set [cluster] namespace to another one",
        )
        level = (found.metadata.labels or {}).get("pod-security.kubernetes.io/enforce")
        return f"pods are held to the profile {level}" if level else "pods are held to no security profile"

    def needed_kinds(self, target: str) -> list[str]:
        """Group and version of the custom resources that a run uses."""
        kinds = [ARGO] if target == "argo" else []
        if self._launches_trainjobs:
            kinds.append(TRAINER)
        return [*kinds, *([KUEUE] if self._cluster.queue else [])]

    def api(self, kind: str) -> str:
        """Whether the server has that version of a group."""
        group, _, version = kind.partition("/")
        groups = self._call(lambda: self._apis.get_api_versions(_request_timeout=TIMEOUT_SECONDS)).groups
        found = next((one for one in groups if one.name == group), None)
        if found is None:
            raise UserError(f"the cluster has no {group}: {_ADVICE[kind]}")
        versions = [one.version for one in found.versions]
        if version not in versions:
            raise UserError(f"the cluster's {group} has {', '.join(versions)} and not {version}: {_ADVICE[kind]}")
        hint = "; TrainJobs need a Kueue whose release notes name Trainer 2.3, which its API does not tell"
        return f"served, among {', '.join(versions)}{hint if kind == KUEUE and self._launches_trainjobs else ''}"

    def needed_rights(self, target: str) -> list[Right]:
        """What submitting, following and cleaning up takes."""
        rights = [Right("list", "pods"), Right("get", "pods", subresource="log")]
        if target == "argo":
            group = ARGO.partition("/")[0]
            rights += [Right(verb, "workflowtemplates", group) for verb in ("get", "create", "update", "delete")]
            rights += [Right(verb, "workflows", group) for verb in ("get", "list", "create", "delete")]
        return rights

    def right(self, right: Right) -> str:
        """Whether this user has it."""
        attributes = {"namespace": self._cluster.namespace, "verb": right.verb, "resource": right.resource}
        attributes |= {"group": right.group} if right.group else {}
        attributes |= {"subresource": right.subresource} if right.subresource else {}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        answer = self._call(
            lambda: self._authorization.create_self_subject_access_review(body, _request_timeout=TIMEOUT_SECONDS)
        )
        if not answer.status.allowed:
            raise UserError(f"you may not: have the role tuneloop-submitter of {self._cluster.namespace} bound to you "
                            "(manifests/README.md)")  # fmt: skip
        return "granted"

    def service_account(self) -> str:
        """Whether it is there."""
        name = self._cluster.service_account
        self._read(f"service account {name}", lambda: self._kube.core.read_namespaced_service_account(
            name, self._cluster.namespace, _request_timeout=TIMEOUT_SECONDS),
            "apply manifests/overlays, or name another one in [cluster] service_account")  # fmt: skip
        return "is there"

    def secret(self, name: str) -> str:
        """Whether it is there, with the keys that are used."""
        found = self._read(f"secret {name}", lambda: self._kube.core.read_namespaced_secret(
            name, self._cluster.namespace, _request_timeout=TIMEOUT_SECONDS),
            "make it (manifests/components/secrets), or correct [cluster] secrets")  # fmt: skip
        wanted = {one.key for one in self._cluster.secrets if one.secret == name and not one.optional}
        if missing := sorted(wanted - set(found.data or {})):
            raise UserError(f"has no key {', '.join(missing)}: add it, or correct [cluster] secrets")
        return f"has {', '.join(sorted(wanted))}" if wanted else "is there"

    def gpus(self, wanted: int) -> str:
        """Whether some node has that many of the resource, and takes the pods."""
        cluster = self._cluster
        nodes = self._allowed("list nodes", lambda: self._kube.core.list_node(_request_timeout=TIMEOUT_SECONDS)).items
        selector = {**cluster.node_selector, **cluster.gpu_node_selector}
        tolerations = cluster.tolerations + cluster.gpu_tolerations
        return look_at_nodes(nodes, wanted, cluster.gpu_resource, selector, tolerations)

    def quotas(self) -> str:
        """Whether the namespace's quotas leave room for the run."""
        name, core = self._cluster.namespace, self._kube.core
        found = self._allowed(
            "list resource quotas", lambda: core.list_namespaced_resource_quota(name, _request_timeout=TIMEOUT_SECONDS)
        )
        return look_at_quotas(found.items, demands(self._config, self._defaults), self._defaults)

    @functools.cached_property
    def _defaults(self) -> Defaults:
        """What containers are counted with that ask for nothing; nothing, where one may not look."""
        name, core = self._cluster.namespace, self._kube.core
        with contextlib.suppress(NotChecked):
            ranges = self._allowed(
                "list limit ranges", lambda: core.list_namespaced_limit_range(name, _request_timeout=TIMEOUT_SECONDS)
            )
            return defaults_of(ranges.items)
        return Defaults({}, {})

    def runtime(self) -> str:
        """Whether what TrainJobs are made from is there."""
        name, (group, _, version) = self._launches.trainjob.runtime, TRAINER.partition("/")
        self._read(
            f"ClusterTrainingRuntime {name}",
            lambda: self._kube.custom.get_cluster_custom_object(
                group, version, "clustertrainingruntimes", name, _request_timeout=TIMEOUT_SECONDS
            ),
            "apply manifests/components/trainer, or correct lora_rl.distributed.trainjob.runtime",
        )
        return "is there"

    def priority(self) -> str:
        """Whether Kueue knows the priority."""
        name, (group, _, version) = self._cluster.queue_priority, KUEUE.partition("/")
        self._read(
            f"WorkloadPriorityClass {name}",
            lambda: self._kube.custom.get_cluster_custom_object(
                group, version, "workloadpriorityclasses", name, _request_timeout=TIMEOUT_SECONDS
            ),
            "apply manifests/components/kueue, or correct [cluster] queue_priority",
        )
        return "is there"

    def queue(self) -> str:
        """Whether the local queue is there and takes work."""
        group, _, version = KUEUE.partition("/")
        place = (group, version, self._cluster.namespace, "localqueues", self._cluster.queue)
        found = self._read(
            f"local queue {self._cluster.queue}",
            lambda: self._kube.custom.get_namespaced_custom_object(*place, _request_timeout=TIMEOUT_SECONDS),
            "apply manifests/components/kueue, or correct [cluster] queue",
        )
        for condition in (found.get("status") or {}).get("conditions") or []:
            if condition["type"] == "Active" and condition["status"] != "True":
                raise UserError(f"takes no work: {condition.get('message', condition.get('reason', ''))}")
        self.cluster_queue = found["spec"].get("clusterQueue", "")
        return f"of the cluster queue {self.cluster_queue}"

    def queue_quota(self) -> str:
        """Whether the cluster queue could ever admit the run."""
        name, (group, _, version) = self.cluster_queue, KUEUE.partition("/")
        found = self._read(
            f"cluster queue {name}",
            lambda: self._kube.custom.get_cluster_custom_object(
                group, version, "clusterqueues", name, _request_timeout=TIMEOUT_SECONDS
            ),
            "apply manifests/components/kueue, or correct the local queue's clusterQueue",
        )
        return look_at_cluster_queue(name, found["spec"], demands(self._config, self._defaults))

    def _call(self, action: Callable[[], T]) -> T:
        return self._kube.server.call(action)

    def _read(self, what: str, action: Callable[[], T], advice: str) -> T:
        found = self._allowed(f"read {what}", lambda: self._kube.server.absent_as_none(action))
        if found is None:
            raise UserError(f"is not there: {advice}")
        return found

    def _allowed(self, what: str, action: Callable[[], T]) -> T:
        try:
            return self._call(action)
        except Refused as error:
            if error.status == 403:
                raise NotChecked(f"you may not {what}, which a run does not need; ask who may") from None
            raise


def _leading_number(text: str) -> int:
    """Of `34+`, as some vendors write it; 0 when there is none."""
    return int(re.sub(r"\D.*", "", text) or 0)
