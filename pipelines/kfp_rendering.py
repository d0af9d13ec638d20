"""The pipeline as Kubeflow Pipelines takes it: the IR with Kubernetes' platform spec, or alone for any backend."""

import hashlib
import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.config import RunConfig
from components.images import TRAIN_IMAGE
from pipelines.placement import LONGEST_WAIT_SECONDS, StepPlacement, object_name, place
from tuneloop.errors import UserError

NOT_RETRIED = ("check", "report")  # Kubeflow repeats whatever failed, and what check refuses it refuses again
# https://cloud.google.com/vertex-ai/docs/reference/rest/v1/MachineSpec#AcceleratorType
VERTEX_ACCELERATORS = {
    "l4-24gb": "NVIDIA_L4",
    "a100-40gb": "NVIDIA_TESLA_A100",
    "a100-80gb": "NVIDIA_A100_80GB",
    "h100-80gb": "NVIDIA_H100_80GB",
    "h200-141gb": "NVIDIA_H200_141GB",
    "b200-180gb": "NVIDIA_B200",
}


def kubernetes_package(config: RunConfig) -> str:
    """The pipeline for Kubeflow Pipelines on Kubernetes: YAML of two documents, the IR and its platform spec."""
    return _compiled(config, _place_on_kubernetes)


def portable_package(config: RunConfig) -> str:
    """The pipeline for any backend of the IR, Vertex among them: YAML of one document.

    Raises:
        UserError: a step needs a GPU that Vertex does not have.
    """
    return _compiled(config, lambda task, placement: _place_portably(task, placement, _accelerator(config, placement)))


def gitops_objects(config: RunConfig, package: str | None = None) -> str:
    """The pipeline as the objects Pipeline and PipelineVersion, for clusters that take pipelines by kubectl or Argo CD.

    The version's name holds the digest of what it runs, because a PipelineVersion cannot be changed.

    Args:
        package: the pipeline compiled for Kubernetes, if it is at hand.
    """
    from kfp.compiler.compiler_utils import KubernetesManifestOptions

    name = object_name(config)
    options = KubernetesManifestOptions(
        pipeline_name=name,
        pipeline_version_name=f"{name}-{package_digest(package or kubernetes_package(config))[:10]}",
        namespace=config.cluster.namespace,
        include_pipeline_manifest=True,
    )
    return _compiled(config, _place_on_kubernetes, kubernetes_manifest_format=True, kubernetes_manifest_options=options)


def package_digest(text: str) -> str:
    """sha256 (hex) of what a compiled package says, however its YAML is written and whatever the SDK's version."""
    return hashlib.sha256(json.dumps(package_content(text), sort_keys=True).encode()).hexdigest()


def package_content(text: str) -> list[Any]:
    """The documents of a compiled package, without the SDK's version."""
    import yaml

    return [_without_sdk_version(found) for found in yaml.load_all(text, Loader=yaml.CSafeLoader)]


def _without_sdk_version(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_sdk_version(child) for key, child in value.items() if key != "sdkVersion"}
    return value


def config_text(config: RunConfig) -> str:
    """The config as the default of a parameter: JSON on one line.

    Backends replace what stands in double braces; JSON may write the brace of a string as its code point.
    """
    compact = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return compact.replace("{{", r"\u007b{")


def _compiled(config: RunConfig, place_task: Callable[[Any, StepPlacement], None], **options: Any) -> str:
    def place_step(step: str, task: Any) -> None:
        trains = task.container_spec.image == TRAIN_IMAGE
        image = config.cluster.train_image if trains else config.cluster.base_image
        place_task(task, place(config, step, image))

    with tempfile.TemporaryDirectory(prefix="tuneloop-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # kfp's notes to its own developers
        from kfp import dsl
        from kfp.compiler import Compiler

        from pipelines.post_training import build_pipeline

        path = Path(folder) / "pipeline.yaml"
        due = dsl.PIPELINE_JOB_SCHEDULE_TIME_UTC_PLACEHOLDER
        pipeline = build_pipeline(place_step, config_text(config), due)
        Compiler().compile(pipeline, str(path), pipeline_name=object_name(config), **options)  # pyright: ignore[reportArgumentType] - decorated
        return path.read_text()


def _place_everywhere(task: Any, placement: StepPlacement) -> None:
    """What the IR itself can say."""
    task.set_container_image(placement.image)
    task.set_memory_limit(placement.memory)
    for name, value in placement.env.items():
        task.set_env_variable(name, value)


def _place_portably(task: Any, placement: StepPlacement, accelerator: str) -> None:
    _place_everywhere(task, placement)
    _retry(task, placement)
    task.set_cpu_limit(placement.cpu)  # Vertex chooses the machine by the limits, and knows no requests
    if placement.gpus:
        task.set_accelerator_type(accelerator).set_accelerator_limit(placement.gpus)


def _retry(task: Any, placement: StepPlacement, longest: str | None = None) -> None:
    if placement.retries and placement.step not in NOT_RETRIED:
        last_wait = placement.retry_seconds * 2 ** (placement.retries - 1)
        factor = 2.0 if last_wait <= LONGEST_WAIT_SECONDS else 1.0  # there is no upper limit to give
        task.set_retry(placement.retries, f"{placement.retry_seconds}s", factor, longest)


def _accelerator(config: RunConfig, placement: StepPlacement) -> str:
    if placement.gpus and config.check.gpu not in VERTEX_ACCELERATORS:
        kinds = ", ".join(VERTEX_ACCELERATORS)
        raise UserError(
            f"check.gpu = {config.check.gpu!r}: {placement.step} asks for a GPU, and Vertex has {kinds}; name "
            "one of them, or compile for another --target than portable"
        )
    return VERTEX_ACCELERATORS.get(config.check.gpu, "")


def _place_on_kubernetes(task: Any, placement: StepPlacement) -> None:
    from kfp import kubernetes

    _place_everywhere(task, placement)
    # Kubeflow stops to retry when so much time has passed since the first attempt began, that one's hours included.
    _retry(task, placement, f"{(placement.retries + 1) * placement.timeout_seconds}s")
    task.set_memory_request(placement.memory)
    task.set_cpu_request(placement.cpu)  # no limit: what is free may be used
    if placement.gpus:
        task.set_accelerator_type(placement.gpu_resource).set_accelerator_limit(placement.gpus)
    kubernetes.set_timeout(task, placement.timeout_seconds)
    kubernetes.set_security_context(task, run_as_non_root=True)
    for key, value in placement.labels.items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in placement.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in placement.tolerations:
        kubernetes.add_toleration(
            task,
            toleration.key or None,
            toleration.operator,
            toleration.value or None,
            toleration.effect or None,
            toleration.seconds,
        )
    for secret in placement.secrets:
        kubernetes.use_secret_as_env(task, secret.secret, {secret.key: secret.variable}, secret.optional)
    if placement.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(placement.image_pull_secrets))
    if placement.shm:
        kubernetes.empty_dir_mount(task, "shm", "/dev/shm", medium="Memory", size_limit=placement.shm)
