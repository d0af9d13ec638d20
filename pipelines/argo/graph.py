"""The graph of a compiled pipeline: steps, groups of steps, what each waits for, and where its inputs come from."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_CONDITION = re.compile(r"inputs\.parameter_values\['(?P<channel>[^']+)'\] == true")


@dataclass(frozen=True)
class Parameter:
    """An input that is a parameter of the pipeline."""

    name: str


@dataclass(frozen=True)
class Output:
    """An input that a step gives.

    Attributes:
        task: the step's name in the graph.
        key: of its outputs.
    """

    task: str
    key: str


Source = Parameter | Output


@dataclass(frozen=True)
class StepNode:
    """One step; `task` is its name in the graph, `step` its folder under components/."""

    task: str
    step: str
    image: str
    after: tuple[str, ...]
    inputs: dict[str, Source]


@dataclass(frozen=True)
class Group:
    """Steps that run together, if the condition holds.

    Attributes:
        name: as the pipeline's author named it.
        after: names of the steps and groups beside it that it waits for.
        condition: the output that has to be true; None: always.
    """

    name: str
    after: tuple[str, ...]
    condition: Output | None
    nodes: tuple["StepNode | Group", ...]

    def groups(self) -> Iterator["Group"]:
        """This group and all in it, the outer ones first."""
        yield self
        for node in self.nodes:
            if isinstance(node, Group):
                yield from node.groups()

    def steps(self) -> Iterator[StepNode]:
        """All steps in it."""
        for node in self.nodes:
            if isinstance(node, Group):
                yield from node.steps()
            else:
                yield node


@dataclass(frozen=True)
class Graph:
    """A pipeline with one exit step, which runs whatever happened to the body."""

    body: Group
    exit: StepNode
    parameters: dict[str, dict[str, Any]]  # name -> parameterType, defaultValue, description


def read_graph(spec: Mapping[str, Any]) -> Graph:
    """The graph of a pipeline spec, as YAML or JSON holds it."""
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    nodes = _nodes(spec, spec["root"]["dag"], {name: Parameter(name) for name in parameters})
    [body] = [node for node in nodes if isinstance(node, Group)]
    [last] = [node for node in nodes if isinstance(node, StepNode)]
    return Graph(body, last, parameters)


def _nodes(spec: Mapping[str, Any], dag: Mapping[str, Any], scope: Mapping[str, Source]) -> list[StepNode | Group]:
    """The nodes of a DAG whose own inputs are `scope`."""
    names = {task: _name(task, definition) for task, definition in dag["tasks"].items()}
    found: list[StepNode | Group] = []
    for task, definition in sorted(dag["tasks"].items()):
        component = spec["components"][definition["componentRef"]["name"]]
        given = definition.get("inputs", {}).get("parameters", {})
        inputs = {key: source for key, value in given.items() if (source := _source(value, scope))}
        after = tuple(sorted(names[other] for other in definition.get("dependentTasks", ())))
        if "dag" in component:
            condition = _condition(definition, inputs)
            found.append(Group(names[task], after, condition, tuple(_nodes(spec, component["dag"], inputs))))
        else:
            executor = spec["deploymentSpec"]["executors"][component["executorLabel"]]
            image = executor["container"]["image"]
            found.append(StepNode(names[task], task.replace("-", "_"), image, after, inputs))
    return found


def _name(task: str, definition: Mapping[str, Any]) -> str:
    return definition.get("taskInfo", {}).get("name", task)


def _source(value: Mapping[str, Any], scope: Mapping[str, Source]) -> Source | None:
    """Where an input comes from; None for a constant, which is Kubeflow's own placeholder."""
    if "runtimeValue" in value:
        return None
    if "taskOutputParameter" in value:
        output = value["taskOutputParameter"]
        return Output(output["producerTask"], output["outputParameterKey"])
    return scope[value["componentInputParameter"]]


def _condition(definition: Mapping[str, Any], inputs: Mapping[str, Source]) -> Output | None:
    text = definition.get("triggerPolicy", {}).get("condition")
    if not text:
        return None
    match = _CONDITION.fullmatch(" ".join(text.split()))
    source = inputs[match["channel"]] if match else None
    if not isinstance(source, Output):
        raise ValueError(f"a condition that Argo cannot be given: {text}")
    return source
