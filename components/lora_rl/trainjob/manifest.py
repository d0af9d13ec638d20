"""The TrainJob of a run, as a plain object: https://www.kubeflow.org/docs/components/trainer/."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from components.cluster_config import PRIORITY_LABEL, QUEUE_LABEL, ClusterConfig
from components.config import RunConfig

Object = dict[str, Any]

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
LABELS = {"app.kubernetes.io/part-of": "tuneloop", "app.kubernetes.io/component": "lora_rl"}
REQUEST = "tuneloop/request"  # annotation: digest of what the job is to make, and how
NODE = "node"  # what Kubeflow's torch runtimes call the replicated job and its container
_NAME_PART = 20  # of a run's name; pods are called <job>-node-0-<node>-xxxxx, and a host name ends at 63


def job_name(config: RunConfig, output: str) -> str:
    """The name of the job that makes `output`, the same in every attempt; a DNS label of at most 40 characters."""
    readable = re.sub(r"[^a-z0-9]+", "-", config.name)[:_NAME_PART].strip("-")
    return f"tuneloop-{readable}-{hashlib.sha256(output.encode()).hexdigest()[:10]}"


def train_job(config: RunConfig, inputs: Mapping[str, str], output: str, fingerprint: str) -> Object:
    """The job that makes `output`.

    Args:
        inputs: URIs of an object store, by name.
        output: URI in an object store.
        fingerprint: of the step.
    """
    settings, cluster = config.lora_rl.distributed, config.cluster
    node = settings.trainjob
    queued = {QUEUE_LABEL: cluster.queue} if cluster.queue else {}
    if queued and cluster.queue_priority:
        queued |= {PRIORITY_LABEL: cluster.queue_priority}
    spec: Object = {
        "runtimeRef": {"apiGroup": GROUP, "kind": "ClusterTrainingRuntime", "name": node.runtime},
        "suspend": bool(queued),  # until Kueue admits it
        "activeDeadlineSeconds": node.timeout_seconds,
        "trainer": {
            "image": cluster.train_image,
            "command": ["python", "-m", "components.lora_rl.node"],
            "args": [_request(config, inputs, output)],
            "env": _variables(cluster),
            "numNodes": node.nodes,
            "numProcPerNode": settings.processes_per_node,
            "resourcesPerNode": _resources(config),
        },
    }
    if patch := _pod_patch(cluster, bool(node.gpus)):
        spec["runtimePatches"] = [{"manager": "tuneloop", "trainingRuntimeSpec": patch}]
    wanted = json.dumps([fingerprint, spec], sort_keys=True)
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {
            "name": job_name(config, output),
            "namespace": cluster.namespace,
            "labels": {**LABELS, **queued},
            "annotations": {REQUEST: hashlib.sha256(wanted.encode()).hexdigest(), "tuneloop/output": output},
        },
        "spec": spec,
    }


def _request(config: RunConfig, inputs: Mapping[str, str], output: str) -> str:
    """What `components.lora_rl.node` reads. Kubernetes replaces $(NAME) and $$ in arguments, so there is no dollar."""
    wanted = {"config": config.model_dump(mode="json"), "inputs": dict(inputs), "output": output}
    return json.dumps(wanted, sort_keys=True, separators=(",", ":")).replace("$", r"\u0024")


def _variables(cluster: ClusterConfig) -> list[Object]:
    variables: list[Object] = [{"name": name, "value": value} for name, value in cluster.env.items()]
    for secret in cluster.secrets:
        if not secret.steps or "lora_rl" in secret.steps:
            reference = {"name": secret.secret, "key": secret.key, "optional": secret.optional}
            variables.append({"name": secret.variable, "valueFrom": {"secretKeyRef": reference}})
    return variables


def _resources(config: RunConfig) -> Object:
    node = config.lora_rl.distributed.trainjob
    gpus = {config.cluster.gpu_resource: str(node.gpus)} if node.gpus else {}
    return {"requests": {"cpu": node.cpu, "memory": node.memory, **gpus}, "limits": {"memory": node.memory, **gpus}}


def _pod_patch(cluster: ClusterConfig, on_gpus: bool) -> Object:
    """Where the nodes' pods may run, laid over the runtime; empty when `[cluster]` says nothing of it."""
    selector = cluster.node_selector | (cluster.gpu_node_selector if on_gpus else {})
    tolerations = cluster.tolerations + (cluster.gpu_tolerations if on_gpus else ())
    pod: Object = {
        "nodeSelector": selector,
        "tolerations": [toleration.manifest() for toleration in tolerations],
        "imagePullSecrets": [{"name": name} for name in cluster.image_pull_secrets],
    }
    pod = {key: value for key, value in pod.items() if value}
    if not pod:
        return {}
    job = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    return {"template": {"spec": {"replicatedJobs": [job]}}}
