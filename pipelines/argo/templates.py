"""Argo's templates of a graph: a container a step, a DAG a group."""

from typing import Any

from components.config import RunConfig
from pipelines.argo.artifacts import report_artifact
from pipelines.argo.graph import Graph, Group, Output, Parameter, StepNode
from pipelines.placement import LONGEST_WAIT_SECONDS, StepPlacement, place
from tuneloop.errors import EXIT_TRY_AGAIN

Template = dict[str, Any]

PER_RUN = ("output_uri", "schedule_time")  # handed down, because each tick of a schedule has its own
OUTPUTS = "/tmp/outputs"
# IR output -> (the name of Argo's parameter, the value of the step's summary that it is read from)
VERDICTS = {
    Output("data-prep", "Output"): ("changed", "changed"),
    Output("evaluate", "Output"): ("passed", "gate_passed"),
}
_SIGTERM, _SIGKILL, _UNKNOWN = 128 + 15, 128 + 9, -1
# Not "Failed" with another code: what a step refuses once it refuses again. An evicted pod and one on a node that was
# shut down are "Failed" too, killed when their grace was over, or without a code where nobody could tell it any more.
_RETRY_WHEN = (
    f"lastRetry.status == 'Error' || asInt(lastRetry.exitCode) in [{EXIT_TRY_AGAIN}, {_SIGTERM}] || "
    f"(asInt(lastRetry.exitCode) in [{_UNKNOWN}, {_SIGKILL}] && !(lastRetry.message contains 'OOMKilled'))"
)
_AT_ONCE = ("check", "report")  # Argo waits before it looks whether to retry: people would wait for a refusal
_USUAL_GRACE_SECONDS = 30  # between SIGTERM and SIGKILL, as Kubernetes has it
_GRACE_MARGIN_SECONDS = 40  # for what follows the grace: saving, and uploading what was saved


def templates(graph: Graph, config: RunConfig) -> list[Template]:
    """The DAGs and steps of a graph; a DAG is called as its group, a step as its task."""
    conditions = {group.condition for group in graph.body.groups() if group.condition}
    steps = [*graph.body.steps(), graph.exit]
    return [
        *(_dag(group) for group in graph.body.groups()),
        *(_step(node, config, graph, conditions) for node in steps),
    ]


def call(name: str, **arguments: str) -> Template:
    """A task of a DAG that runs the template of the same name."""
    return {"name": name, "template": name, "arguments": {"parameters": _parameters(arguments)}}


def _dag(group: Group) -> Template:
    return {
        "name": group.name,
        "inputs": {"parameters": [{"name": name} for name in PER_RUN]},
        "dag": {"tasks": [_task(node) for node in group.nodes]},
    }


def _task(node: StepNode | Group) -> Template:
    name = node.name if isinstance(node, Group) else node.task
    task = call(name, **{key: f"{{{{inputs.parameters.{key}}}}}" for key in PER_RUN})
    if node.after:
        task["dependencies"] = list(node.after)
    if isinstance(node, Group) and node.condition:
        parameter, _ = VERDICTS[node.condition]
        task["when"] = f"{{{{tasks.{node.condition.task}.outputs.parameters.{parameter}}}}} == true"
    return task


def _step(node: StepNode, config: RunConfig, graph: Graph, conditions: set[Output]) -> Template:
    placement = place(config, node.step, node.image)
    is_exit = node is graph.exit
    verdicts = [VERDICTS[output] for output in sorted(conditions, key=str) if output.task == node.task]
    arguments = _exit_arguments() if is_exit else _arguments(node)
    if verdicts:
        arguments += ["--outputs", OUTPUTS]
    template: Template = {
        "name": node.task,
        "inputs": {"parameters": [{"name": name} for name in PER_RUN]},
        "metadata": {"labels": placement.labels},
        "container": _container(placement, arguments),
        "volumes": _volumes(placement),
        "activeDeadlineSeconds": placement.timeout_seconds,
    }
    if verdicts:
        template["outputs"] = {
            "parameters": [{"name": name, "valueFrom": {"path": f"{OUTPUTS}/{file}"}} for name, file in verdicts]
        }
    if is_exit:
        template["outputs"] = {"artifacts": [report_artifact(config, f"{OUTPUTS}/report.html")]}
    if placement.retries:
        template["retryStrategy"] = _retry_strategy(placement)
    if placement.node_selector:
        template["nodeSelector"] = placement.node_selector
    if placement.tolerations:
        template["tolerations"] = [one.manifest() for one in placement.tolerations]
    if patch := _grace(config, node.step):
        template["podSpecPatch"] = patch
    return template


def _retry_strategy(placement: StepPlacement) -> Template:
    strategy = {"limit": placement.retries, "retryPolicy": "Always", "expression": _RETRY_WHEN}
    if placement.step in _AT_ONCE:
        return strategy
    cap = max(placement.retry_seconds, LONGEST_WAIT_SECONDS)
    return strategy | {"backoff": {"duration": f"{placement.retry_seconds}s", "factor": 2, "cap": f"{cap}s"}}


def _arguments(node: StepNode) -> list[str]:
    """What the command line of a step is given: what the IR gives its node, as URIs below the run folder."""
    run = "{{inputs.parameters.output_uri}}"
    config, parameters, inputs = f"{run}/config.json", [], []
    for name, source in sorted(node.inputs.items()):
        if name == "config" and isinstance(source, Parameter):
            config = "{{workflow.parameters.config}}"
        elif name in ("config", "output_uri"):
            continue
        elif isinstance(source, Output):
            inputs += [f"--{name}", f"{run}/{source.task.replace('-', '_')}"]
        else:
            scope = "inputs" if source.name in PER_RUN else "workflow"
            parameters += ["--parameter", f"{name}={{{{{scope}.parameters.{source.name}}}}}"]
    return ["--config", config, *parameters, *inputs, "--output", f"{run}/{node.step}", "--node"]


def _exit_arguments() -> list[str]:
    error = "{{=workflow.status == 'Succeeded' ? '' : 'the workflow ended as ' + workflow.status}}"
    run = "{{inputs.parameters.output_uri}}"
    return ["--run", run, "--error", error, "--page", f"{OUTPUTS}/report.html"]


def _container(placement: StepPlacement, arguments: list[str]) -> Template:
    resources = {"requests": {"cpu": placement.cpu, "memory": placement.memory}, "limits": {"memory": placement.memory}}
    if placement.gpus:
        resources["limits"][placement.gpu_resource] = str(placement.gpus)
    variables: list[Template] = [{"name": name, "value": value} for name, value in placement.env.items()]
    for secret in placement.secrets:
        reference = {"name": secret.secret, "key": secret.key, "optional": secret.optional}
        variables.append({"name": secret.variable, "valueFrom": {"secretKeyRef": reference}})
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    if placement.shm:
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    return {
        "image": placement.image,
        "command": ["python", "-m", f"components.{placement.step}"],
        "args": arguments,
        "env": variables,
        "resources": resources,
        "volumeMounts": mounts,
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _volumes(placement: StepPlacement) -> list[Template]:
    volumes: list[Template] = [{"name": "tmp", "emptyDir": {}}]
    if placement.shm:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": placement.shm}})
    return volumes


def _grace(config: RunConfig, step: str) -> str:
    """A pod's time to save its training, where the usual one does not suffice."""
    if step not in ("sft_warmup", "lora_rl"):
        return ""
    seconds = int(getattr(config, step).stop_grace_seconds) + _GRACE_MARGIN_SECONDS
    return f'{{"terminationGracePeriodSeconds": {max(seconds, _USUAL_GRACE_SECONDS)}}}'


def _parameters(values: dict[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in values.items()]
