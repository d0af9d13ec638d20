"""What the rendered files say, read from them alone and brought into one form, so that two of them can be compared."""

import itertools
import re
from dataclasses import dataclass
from typing import Any

import yaml

from pipelines.compile import COMPILED

Manifest = dict[str, Any]
Path = tuple[str, ...]  # names from the outermost group to the node


@dataclass(frozen=True)
class Rendered:
    """One rendering's pipeline.

    Attributes:
        after: of every node and group: the names beside it that it waits for.
        conditions: of every group with one: the step whose verdict has to be true.
        inputs: of every step: input -> the step or parameter that it comes from.
        pods: of every step: what its pod asks for.
        parameters: name -> default.
    """

    after: dict[Path, set[str]]
    conditions: dict[Path, str]
    inputs: dict[str, dict[str, str]]
    pods: dict[str, dict[str, Any]]
    parameters: dict[str, Any]


def documents(file: str) -> list[Manifest]:
    """The YAML documents of a checked-in rendering."""
    return list(yaml.load_all((COMPILED / file).read_text(), Loader=yaml.CSafeLoader))


def read_kubeflow(documents: list[Manifest]) -> Rendered:
    """From the IR and its platform spec."""
    spec, platform = documents
    found = Rendered({}, {}, {}, {}, {})
    executors = spec["deploymentSpec"]["executors"]
    extras = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]

    def visit(dag: Manifest, at: Path, scope: dict[str, str]) -> None:
        names = {task: value["taskInfo"]["name"] for task, value in dag["tasks"].items()}
        for task, value in dag["tasks"].items():
            path = (*at, names[task])
            component = spec["components"][value["componentRef"]["name"]]
            given = value["inputs"]["parameters"]
            inputs = {
                key: source["taskOutputParameter"]["producerTask"]
                if "taskOutputParameter" in source
                else scope[source["componentInputParameter"]]
                for key, source in given.items()
                if "runtimeValue" not in source  # Kubeflow's placeholder for when a run was due
            }
            found.after[path] = {names[other] for other in value.get("dependentTasks", ())}
            if condition := value.get("triggerPolicy", {}).get("condition"):
                [channel] = re.findall(r"\['(.*)'\]\s+== true", condition)
                found.conditions[path] = inputs[channel]
            if "dag" in component:
                visit(component["dag"], path, inputs)
            else:
                found.inputs[task] = inputs
                label = component["executorLabel"]
                found.pods[task] = _kubeflow_pod(executors[label]["container"], extras[label], value)

    parameters = spec["root"]["inputDefinitions"]["parameters"]
    visit(spec["root"]["dag"], (), {name: name for name in parameters})
    report = spec["root"]["dag"]["tasks"]["report"]
    assert report["triggerPolicy"] == {"strategy": "ALL_UPSTREAM_TASKS_COMPLETED"}
    assert found.after.pop(("report",)) == {"post-training"}
    found.parameters.update({name: value["defaultValue"] for name, value in parameters.items()})
    return found


def _kubeflow_pod(container: Manifest, extras: Manifest, task: Manifest) -> dict[str, Any]:
    resources = container["resources"]
    gpu = resources.get("accelerator", {})
    return {
        "image": container["image"],
        "cpu": resources["resourceCpuRequest"],
        "memory": (resources["resourceMemoryRequest"], resources["resourceMemoryLimit"]),
        "gpus": (gpu["resourceType"], gpu["resourceCount"]) if gpu else None,
        "env": {(one["name"], one["value"]) for one in container["env"]},
        "secrets": {
            (key["envVar"], secret["secretName"], key["secretKey"], secret["optional"])
            for secret in extras["secretAsEnv"]
            for key in secret["keyToEnv"]
        },
        "labels": extras["podMetadata"]["labels"],
        "nodes": extras["nodeSelector"]["labels"],
        "tolerations": [tuple(sorted(one.items())) for one in extras["tolerations"]],
        "timeout": int(extras["activeDeadlineSeconds"]),
        "shm": {one["mountPath"]: (one["medium"], one["sizeLimit"]) for one in extras.get("emptyDirMounts", ())},
        "retries": task.get("retryPolicy", {}).get("maxRetryCount", 0),
        "non_root": extras["securityContext"]["runAsNonRoot"],
        "pull_secrets": [one["secretName"] for one in extras["imagePullSecret"]],
    }


def read_argo(workflow_template: Manifest) -> Rendered:
    """From the WorkflowTemplate."""
    spec = workflow_template["spec"]
    templates = {template["name"]: template for template in spec["templates"]}
    found = Rendered({}, {}, {}, {}, {})

    def visit(dag: Manifest, at: Path) -> None:
        for task in dag["tasks"]:
            path = (*at, task["name"])
            template = templates[task["template"]]
            found.after[path] = set(task.get("dependencies", ()))
            if "when" in task:
                [found.conditions[path]] = re.findall(r"^\{\{tasks\.([^.]+)\.outputs\.\S+\}\} == true$", task["when"])
            if "dag" in template:
                visit(template["dag"], path)
            else:
                step(task["name"], template)

    def step(name: str, template: Manifest) -> None:
        found.inputs[name] = argo_inputs(template["container"]["args"])
        found.pods[name] = _argo_pod(template, spec)

    visit(templates[spec["entrypoint"]]["dag"], ())
    [last] = templates[spec["onExit"]]["dag"]["tasks"]
    step(last["name"], templates[last["template"]])
    found.parameters.update({one["name"]: one["value"] for one in spec["arguments"]["parameters"]})
    return found


def argo_inputs(args: list[str]) -> dict[str, str]:
    """Input -> where it comes from, of the options of a step's command line."""
    inputs = {}
    for option, value in itertools.pairwise(args):
        name, run = option.removeprefix("--"), "{{inputs.parameters.output_uri}}"
        if option == "--parameter":
            name, _, value = value.partition("=")
            [inputs[name]] = re.findall(r"^\{\{(?:workflow|inputs)\.parameters\.(\w+)\}\}$", value)
        elif option == "--config":
            inputs[name] = {f"{run}/config.json": "check", "{{workflow.parameters.config}}": "config"}[value]
        elif option in ("--output", "--run"):
            assert value.startswith(run)
            inputs["output_uri"] = "output_uri"
        elif option.startswith("--") and value.startswith(run):
            inputs[name] = value.removeprefix(f"{run}/").replace("_", "-")
    return inputs


def _argo_pod(template: Manifest, spec: Manifest) -> dict[str, Any]:
    container = template["container"]
    resources = container["resources"]
    gpus = {key: value for key, value in resources["limits"].items() if key != "memory"}
    env = container["env"]
    paths = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    references = [(one["name"], one["valueFrom"]["secretKeyRef"]) for one in env if "valueFrom" in one]
    return {
        "image": container["image"],
        "cpu": resources["requests"]["cpu"],
        "memory": (resources["requests"]["memory"], resources["limits"]["memory"]),
        "gpus": next(iter(gpus.items())) if gpus else None,
        "env": {(one["name"], one["value"]) for one in env if "value" in one},
        "secrets": {(name, one["name"], one["key"], one["optional"]) for name, one in references},
        "labels": template["metadata"]["labels"],
        "nodes": template["nodeSelector"],
        "tolerations": [tuple(sorted(one.items())) for one in template["tolerations"]],
        "timeout": template["activeDeadlineSeconds"],
        "shm": {
            paths[one["name"]]: (one["emptyDir"]["medium"], one["emptyDir"]["sizeLimit"])
            for one in template["volumes"]
            if one["emptyDir"]
        },
        "retries": template.get("retryStrategy", {}).get("limit", 0),
        "non_root": container["securityContext"]["runAsNonRoot"],
        "pull_secrets": [one["name"] for one in spec["imagePullSecrets"]],
    }
