"""The few calls of Kubernetes' API that following a TrainJob takes, each repeated while the server is away."""

import json
import os
import time
from collections.abc import Iterator
from typing import Any

from components import kube_config
from components.api_calls import TIMEOUT_SECONDS, ApiServer, Refused
from components.lora_rl.trainjob.manifest import GROUP, PLURAL, VERSION, Object
from tuneloop.errors import UserError

JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"  # of a pod; a TrainJob's JobSet has the TrainJob's name
_SLACK_SECONDS = 15.0  # of a watch that the server is to end by itself
_AGAIN_SECONDS = 1.0  # after a watch that broke
_GONE = 410  # the version is too old; the caller looks at the job anew


class TrainJobApi:
    """A namespace's TrainJobs and their pods.

    Attributes:
        server: calls with patience.
        core: the client of pods and their logs; a new one after credentials were renewed.

    Raises:
        UserError: there are no credentials for a cluster.
    """

    def __init__(self, namespace: str, patience_seconds: float):
        self.namespace = namespace
        login = "the step's service account needs the role tuneloop-launcher (manifests/README.md)"
        self.server = ApiServer("Kubernetes", login, patience_seconds, renew=self._connect)
        self._connect()

    def _connect(self) -> None:
        import kubernetes

        try:
            configuration = kube_config.configuration(of_the_pod=kube_config.IN_CLUSTER in os.environ)
        except kube_config.Unusable as error:
            raise UserError(f'lora_rl.distributed.launcher = "trainjob" needs a Kubernetes cluster, and there are no '
                            f"credentials for one ({error}); run it there, or set it inline") from None  # fmt: skip
        client = kubernetes.client.ApiClient(configuration)
        self.server.name = f"Kubernetes at {configuration.host}"
        self.core: Any = kubernetes.client.CoreV1Api(client)  # generated, with return types that are no help
        self._custom: Any = kubernetes.client.CustomObjectsApi(client)

    def find(self, name: str, *, briefly: bool = False) -> Object | None:
        """The job of this name; None if there is none.

        Args:
            briefly: give up soon when the server is away.
        """
        return (self.server.briefly if briefly else self.server.call)(lambda: self._find(name))

    def _find(self, name: str) -> Object | None:
        return self.server.absent_as_none(
            lambda: self._custom.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, name, _request_timeout=TIMEOUT_SECONDS
            )
        )

    def ensure(self, job: Object) -> tuple[Object, bool]:
        """The job of this name, made from `job` if there was none; and whether it was made here."""
        return self.server.ensure(
            lambda: self._find(job["metadata"]["name"]),
            lambda: self._custom.create_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, job, _request_timeout=TIMEOUT_SECONDS
            ),
        )

    def delete(self, job: Object, *, briefly: bool = False) -> None:
        """Have this very job removed, after its pods: they get SIGTERM, and their grace to save what they have.

        Args:
            briefly: give up soon when the server is away.
        """
        metadata = job["metadata"]
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": metadata["uid"]}}

        def delete() -> None:
            try:
                self.server.absent_as_none(
                    lambda: self._custom.delete_namespaced_custom_object(
                        GROUP, VERSION, self.namespace, PLURAL, metadata["name"], body=options,
                        _request_timeout=TIMEOUT_SECONDS,
                    )
                )  # fmt: skip
            except Exception as error:
                if getattr(error, "status", None) != 409:  # another job has this name now
                    raise

        (self.server.briefly if briefly else self.server.call)(delete)

    def watch(self, name: str, version: str, seconds: float) -> Iterator[Object]:
        """The job after each change; ends after `seconds`, when the connection breaks, or when `version` is too old.

        Args:
            version: resourceVersion after which changes are wanted.
        """
        import urllib3

        try:
            response = self.server.call(
                lambda: self._custom.list_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, PLURAL, watch=True, field_selector=f"metadata.name={name}",
                    resource_version=version, timeout_seconds=max(1, int(seconds)), _preload_content=False,
                    _request_timeout=(TIMEOUT_SECONDS[0], seconds + _SLACK_SECONDS),
                )
            )  # fmt: skip
        except Refused as error:
            if error.status == _GONE:
                return
            raise
        rest = b""
        try:
            for piece in response.stream():
                *lines, rest = (rest + piece).split(b"\n")
                for event in map(json.loads, filter(None, lines)):
                    if event["type"] == "ERROR":  # 410 again, or a server that ends
                        time.sleep(_AGAIN_SECONDS)
                        return
                    yield event["object"] | {"deleted": event["type"] == "DELETED"}
        except urllib3.exceptions.HTTPError:
            time.sleep(_AGAIN_SECONDS)
        finally:
            response.close()

    def phase(self, pod: str) -> str:
        """A pod's phase; empty when it is removed."""
        found = self.server.call(
            lambda: self.server.absent_as_none(
                lambda: self.core.read_namespaced_pod(pod, self.namespace, _request_timeout=TIMEOUT_SECONDS)
            )
        )
        return found.status.phase if found else ""

    def pods(self, name: str) -> list[Any]:
        """The pods of the job of this name, the oldest first."""
        answer = self.server.call(
            lambda: self.core.list_namespaced_pod(
                self.namespace, label_selector=f"{JOBSET_LABEL}={name}", _request_timeout=TIMEOUT_SECONDS
            )
        )
        return sorted(answer.items, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))
