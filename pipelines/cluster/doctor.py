"""Looks at a cluster before the first run: what a run will need, and what to do about what is missing.

Every check is one line. A check that this user may not make says so and counts as neither; one that cannot be made
because an earlier one failed is left out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from components.config import RunConfig
from pipelines.cluster.connection import ConnectionSettings
from pipelines.cluster.doctor_cluster import ClusterLook
from pipelines.cluster.doctor_places import look_at_image, look_at_store
from pipelines.cluster.not_checked import NotChecked
from pipelines.cluster.submission import prepare, require_fit
from pipelines.placement import place
from pipelines.steps import STEP_NAMES
from tuneloop.errors import TuneloopError, UserError
from tuneloop.storage import is_remote

OK, FAILED, UNKNOWN = "ok", "FAILED", "unknown"


@dataclass(frozen=True)
class Finding:
    """What a check found; of a failed one, `text` says what to do."""

    state: str
    what: str
    text: str


def examine(config: RunConfig, runs_uri: str, target: str, settings: ConnectionSettings) -> Iterator[Finding]:
    """Make every check that a run of this config needs, one after the other.

    Args:
        runs_uri: the folder of all runs.
        target: kfp or argo.
    """
    yield _finding("config and plan", lambda: _config(config, runs_uri))
    if is_remote(runs_uri):
        yield _finding("object store", lambda: look_at_store(runs_uri))
    if config.promote.registry.startswith("s3://"):
        yield _finding("registry's store", lambda: look_at_store(config.promote.registry))
    for image in sorted({config.cluster.base_image, config.cluster.train_image}):
        yield _finding(f"image {image}", lambda image=image: look_at_image(image, config.cluster.image_pull_secrets))
    if target == "kfp":
        yield _finding("Kubeflow Pipelines", lambda: _kubeflow(config, settings))
    cluster: ClusterLook | None = None

    def reach() -> str:
        nonlocal cluster
        cluster = ClusterLook(config, settings)
        return cluster.version()

    yield _finding("Kubernetes", reach)
    if cluster is None:
        return
    yield from (_finding(what, check) for what, check in _of_the_cluster(cluster, config, target))


def _of_the_cluster(look: ClusterLook, config: RunConfig, target: str) -> Iterator[tuple[str, Callable[[], str]]]:
    yield f"namespace {config.cluster.namespace}", look.namespace
    for kind in look.needed_kinds(target):
        yield f"API {kind}", lambda kind=kind: look.api(kind)
    for right in look.needed_rights(target):
        yield f"permission {right}", lambda right=right: look.right(right)
    if config.cluster.service_account:
        yield f"service account {config.cluster.service_account}", look.service_account
    for secret in sorted({found.secret for found in config.cluster.secrets if not found.optional}):
        yield f"secret {secret}", lambda secret=secret: look.secret(secret)
    for secret in config.cluster.image_pull_secrets:
        yield f"secret {secret}", lambda secret=secret: look.secret(secret)
    launches = config.lora_rl.distributed.launcher == "trainjob"
    if launches:
        yield f"training runtime {config.lora_rl.distributed.trainjob.runtime}", look.runtime
    nodes = config.lora_rl.distributed.trainjob.gpus if launches else 0
    gpus = max(nodes, *(place(config, step, "").gpus for step in STEP_NAMES))
    if gpus:
        yield f"{gpus} x {config.cluster.gpu_resource} on one node", lambda: look.gpus(gpus)
    yield "quotas of the namespace", look.quotas
    if config.cluster.queue:
        yield f"queue {config.cluster.queue}", look.queue
        if look.cluster_queue:
            yield f"cluster queue {look.cluster_queue}", look.queue_quota
        if config.cluster.queue_priority:
            yield f"priority {config.cluster.queue_priority}", look.priority


def _config(config: RunConfig, runs_uri: str) -> str:
    prepare(config, runs_uri)
    return require_fit(config)


def _kubeflow(config: RunConfig, settings: ConnectionSettings) -> str:
    from pipelines.cluster.connection import KfpConnection

    connection = KfpConnection(settings)
    if connection.namespace:
        return f"{connection.server.name}, for several users, namespace {connection.namespace}"
    if config.cluster.namespace != connection.kfp_namespace:
        raise UserError(
            f"{connection.server.name}: has a single user, so pods run in its own namespace and find their secrets and "
            f'queue there: set [cluster] namespace = "{connection.kfp_namespace}" (docs/kubeflow.md), or say with '
            "--kfp-namespace where it is"
        )
    return f"{connection.server.name}, for a single user"


def _finding(what: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(OK, what, check())
    except NotChecked as reason:
        return Finding(UNKNOWN, what, str(reason))
    except TuneloopError as error:
        return Finding(FAILED, what, " ".join(str(error).split()))


def require_healthy(findings: list[Finding]) -> None:
    """Refuse when something failed.

    Raises:
        UserError: with the number of failed checks.
    """
    failed = sum(found.state == FAILED for found in findings)
    if failed:
        raise UserError(f"{failed} of {len(findings)} checks failed; a run would fail for the same reasons")
