"""WorkflowTemplate and CronWorkflow of a run's config."""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from components.config import RunConfig
from pipelines.argo.graph import Graph, read_graph
from pipelines.argo.templates import PER_RUN, call, templates
from pipelines.kfp_rendering import kubernetes_package
from pipelines.placement import PART_OF_LABEL, object_name

API_VERSION = "argoproj.io/v1alpha1"
MAIN, MAIN_EXIT = "main", "exit"  # entrypoint and exit handler of a run that somebody starts
TICK, TICK_EXIT = "tick", "tick-exit"  # and of one that a schedule starts
_POD_SECONDS = 600  # that a pod is kept after its success, for its log
_DAY_SECONDS = 86_400
# Argo's own image runs as root when it is told nothing else, and its containers have no security context unless the
# controller is configured to give them one: a namespace that is held to the restricted profile refuses such pods.
_USER = 1000  # as in images/: the files that a step leaves for Argo's container are its own
_POD_SECURITY = {"runAsNonRoot": True, "runAsUser": _USER, "runAsGroup": _USER, "fsGroup": _USER,
                 "seccompProfile": {"type": "RuntimeDefault"}}  # fmt: skip
_EXECUTOR_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
_EXECUTOR_PATCH = {
    "initContainers": [{"name": "init", "securityContext": _EXECUTOR_SECURITY}],
    "containers": [{"name": "wait", "securityContext": _EXECUTOR_SECURITY}],
}


def argo_objects(config: RunConfig, package: str | None = None) -> list[dict[str, Any]]:
    """The WorkflowTemplate, and with `[cluster.schedule]` the CronWorkflow.

    Args:
        package: the pipeline compiled for Kubernetes, if it is at hand.
    """
    spec = next(yaml.load_all(package or kubernetes_package(config), Loader=yaml.CSafeLoader))
    graph = read_graph(spec)
    found = [_workflow_template(config, graph, spec["pipelineInfo"].get("description", ""))]
    return found + ([_cron_workflow(config)] if config.cluster.schedule else [])


def workflow(config: RunConfig, name: str, arguments: Mapping[str, str]) -> dict[str, Any]:
    """A Workflow that runs the WorkflowTemplate once.

    Args:
        name: of the Workflow; the same name is the same run.
        arguments: parameters of the pipeline that differ from their defaults; `output_uri` has to be among them.
    """
    parameters = [{"name": key, "value": str(value)} for key, value in arguments.items()]
    reference = {"name": object_name(config)}
    return {
        "apiVersion": API_VERSION,
        "kind": "Workflow",
        "metadata": _metadata(config, name),
        "spec": {"workflowTemplateRef": reference, "arguments": {"parameters": parameters}},
    }


def _metadata(config: RunConfig, name: str) -> dict[str, Any]:
    return {"name": name, "namespace": config.cluster.namespace, "labels": {PART_OF_LABEL: "tuneloop"}}


def _workflow_template(config: RunConfig, graph: Graph, description: str) -> dict[str, Any]:
    cluster = config.cluster
    spec: dict[str, Any] = {
        "entrypoint": MAIN,
        "onExit": MAIN_EXIT,
        "arguments": {"parameters": [_parameter(name, graph.parameters[name]) for name in graph.parameters]},
        "securityContext": _POD_SECURITY,
        "podSpecPatch": json.dumps(_EXECUTOR_PATCH),
        "podGC": {"strategy": "OnPodSuccess", "deleteDelayDuration": f"{_POD_SECONDS}s"},
        "ttlStrategy": {"secondsAfterCompletion": cluster.keep_days * _DAY_SECONDS},
        "workflowMetadata": {"labels": {PART_OF_LABEL: "tuneloop"}},
        "templates": [*_entrypoints(graph), *templates(graph, config)],
    }
    if cluster.service_account:
        spec["serviceAccountName"] = cluster.service_account
    if cluster.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in cluster.image_pull_secrets]
    metadata = _metadata(config, object_name(config))
    metadata["annotations"] = {
        "workflows.argoproj.io/title": object_name(config),
        "workflows.argoproj.io/description": description,
    }
    return {"apiVersion": API_VERSION, "kind": "WorkflowTemplate", "metadata": metadata, "spec": spec}


def _parameter(name: str, definition: Mapping[str, Any]) -> dict[str, str]:
    value = definition["defaultValue"]
    if definition["parameterType"] == "NUMBER_INTEGER":
        value = int(value)  # the IR writes every number as a float
    return {"name": name, "value": str(value), "description": definition.get("description", "")}


def _entrypoints(graph: Graph) -> list[dict[str, Any]]:
    """Body and exit step of one run, and the same of a tick, which has a run folder of its own and knows its time."""
    once = {name: f"{{{{workflow.parameters.{name}}}}}" for name in PER_RUN}
    tick = {"output_uri": once["output_uri"] + "/{{workflow.name}}", "schedule_time": "{{workflow.scheduledTime}}"}
    body, last = graph.body.name, graph.exit.task
    calls = {MAIN: call(body, **once), MAIN_EXIT: call(last, **once),
             TICK: call(body, **tick), TICK_EXIT: call(last, **tick)}  # fmt: skip
    return [{"name": name, "dag": {"tasks": [task]}} for name, task in calls.items()]


def _cron_workflow(config: RunConfig) -> dict[str, Any]:
    schedule = config.cluster.schedule
    assert schedule
    runs = [{"name": "output_uri", "value": schedule.runs_uri.rstrip("/")}]
    return {
        "apiVersion": API_VERSION,
        "kind": "CronWorkflow",
        "metadata": _metadata(config, object_name(config)),
        "spec": {
            "schedules": list(schedule.schedules),
            "timezone": schedule.timezone,
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": schedule.starting_deadline_seconds,
            "suspend": schedule.suspend,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 3,
            "workflowSpec": {
                "workflowTemplateRef": {"name": object_name(config)},
                "entrypoint": TICK,
                "onExit": TICK_EXIT,
                "arguments": {"parameters": runs},
            },
        },
    }
