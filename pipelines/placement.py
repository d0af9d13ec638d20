"""Where each step runs: `[cluster]` and the rest of a config as images, resources and rules, a step at a time.

Both backends' renderings read the same placement; it imports neither torch nor kfp.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from components.cluster_config import (
    PASSWORD_IN_URL,
    PRIORITY_LABEL,
    QUEUE_LABEL,
    SecretVariable,
    StepResources,
    Toleration,
)
from components.config import RunConfig
from tuneloop.errors import UserError

HOLDS_A_MODEL = ("sft_warmup", "lora_rl", "evaluate")  # on the GPU, where there is one; rollouts go through /dev/shm
PART_OF_LABEL, STEP_LABEL = "app.kubernetes.io/part-of", "app.kubernetes.io/component"

_NAME_LENGTH = 40  # of an object: Argo adds a time to a CronWorkflow's, and a label's value ends at 63
_HOUR = 3600
LONGEST_WAIT_SECONDS = 1800  # before a retry, however many there were
_USUAL = {  # CPUs, memory, seconds of one attempt
    "check": ("1", "4Gi", _HOUR),
    "data_prep": ("2", "8Gi", 6 * _HOUR),
    "sft_warmup": ("8", "32Gi", 24 * _HOUR),
    "lora_rl": ("8", "64Gi", 72 * _HOUR),
    "merge_adapter": ("4", "32Gi", 6 * _HOUR),
    "evaluate": ("8", "32Gi", 24 * _HOUR),
    "promote": ("1", "4Gi", _HOUR),
    "report": ("1", "2Gi", _HOUR),
}
_LAUNCHER = ("500m", "1Gi")


@dataclass(frozen=True)
class StepPlacement:
    """What a step's pod asks for.

    Attributes:
        image: with tag or digest.
        cpu, memory: Kubernetes quantities.
        gpus: how many of `gpu_resource`; 0: none.
        timeout_seconds: of one attempt.
        retries: after a preemption; the first after `retry_seconds`.
        shm: size of /dev/shm; empty: the container runtime's own.
        secrets: keys of Secrets that become environment variables.
    """

    step: str
    image: str
    image_pull_secrets: tuple[str, ...]
    cpu: str
    memory: str
    gpus: int
    gpu_resource: str
    timeout_seconds: int
    retries: int
    retry_seconds: int
    shm: str
    labels: dict[str, str]
    node_selector: dict[str, str]
    tolerations: tuple[Toleration, ...]
    env: dict[str, str]
    secrets: tuple[SecretVariable, ...]


def place(config: RunConfig, step: str, image: str) -> StepPlacement:
    """Where a step of this run is placed.

    Args:
        image: the one that the step's component names; `[cluster]` may name it otherwise.
    """
    cluster = config.cluster
    asked: StepResources = getattr(cluster.steps, step)
    cpu, memory, seconds = _USUAL[step]
    launches = step == "lora_rl" and config.lora_rl.distributed.launcher == "trainjob"
    if launches:  # it follows the nodes that train
        cpu, memory = _LAUNCHER
    gpus = asked.gpus if asked.gpus is not None else _gpus(config, step)
    labels = {PART_OF_LABEL: "tuneloop", STEP_LABEL: step}
    if gpus and cluster.queue:
        labels |= {QUEUE_LABEL: cluster.queue}
        labels |= {PRIORITY_LABEL: cluster.queue_priority} if cluster.queue_priority else {}
    return StepPlacement(
        step=step,
        image=image,
        image_pull_secrets=cluster.image_pull_secrets,
        cpu=asked.cpu or cpu,
        memory=asked.memory or memory,
        gpus=gpus,
        gpu_resource=cluster.gpu_resource,
        timeout_seconds=asked.timeout_seconds or seconds,
        retries=cluster.retries,
        retry_seconds=cluster.retry_seconds,
        shm=cluster.shm if step in HOLDS_A_MODEL and not launches else "",
        labels=labels,
        node_selector=cluster.node_selector | (cluster.gpu_node_selector if gpus else {}),
        tolerations=cluster.tolerations + (cluster.gpu_tolerations if gpus else ()),
        env=dict(cluster.env),
        secrets=tuple(secret for secret in cluster.secrets if not secret.steps or step in secret.steps),
    )


def _gpus(config: RunConfig, step: str) -> int:
    if not config.check.gpu or step not in HOLDS_A_MODEL:
        return 0
    if step == "lora_rl":
        return config.check.gpus if config.lora_rl.distributed.launcher == "inline" else 0
    if step == "evaluate" and config.evaluate.engine.kind == "vllm":
        return config.evaluate.engine.tensor_parallel_size
    return 1


def object_name(config: RunConfig) -> str:
    """What the run's pipeline is called on every console: `tuneloop-<config name>` as Kubernetes takes names."""
    name = re.sub(r"[^a-z0-9]+", "-", config.name).strip("-")
    if len(name) > _NAME_LENGTH:
        name = f"{name[: _NAME_LENGTH - 7].strip('-')}-{hashlib.sha256(config.name.encode()).hexdigest()[:6]}"
    return f"tuneloop-{name}"


def require_reachable(config: RunConfig) -> None:
    """Refuse what only this machine could reach: a pod's disk ends with the pod.

    Raises:
        UserError: the registry is a local path.
    """
    registry = config.promote.registry
    if not registry.startswith("s3://"):
        raise UserError(
            f"promote.registry = {registry}: is a folder, and every step of a cluster has a disk of its own; set it to "
            "s3://bucket/prefix"
        )


def require_no_password(config: RunConfig) -> None:
    """Refuse a password in a URL: every rendering holds the whole config.

    Raises:
        UserError: names the setting, not the password.
    """
    for setting, value in _texts(config.model_dump(mode="json")):
        if PASSWORD_IN_URL.search(value):
            raise UserError(
                f"{setting}: the URL holds a password, and everybody who sees the pipeline would see it; put it into a "
                "Secret and name that in cluster.secrets"
            )


def _texts(value: Any, setting: str = "") -> Iterator[tuple[str, str]]:
    """(setting, value) of every text in a config."""
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _texts(child, f"{setting}.{key}" if setting else key)
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from _texts(child, f"{setting}[{number}]")
    elif isinstance(value, str):
        yield setting, value
