"""Whether some node of a cluster can hold a step with GPUs."""

from collections.abc import Mapping, Sequence
from typing import Any

from components.cluster_config import Toleration
from pipelines.cluster.not_checked import NotChecked
from tuneloop.errors import UserError

_REPELS = ("NoSchedule", "NoExecute")


def look_at_nodes(
    nodes: Sequence[Any], wanted: int, resource: str, selector: Mapping[str, str], tolerations: Sequence[Toleration]
) -> str:
    """Find a node with `wanted` of a resource that has the selector's labels and no taint that repels the pod.

    Args:
        nodes: kubernetes' V1Node.

    Raises:
        UserError: there is none.
        NotChecked: there is none but for a taint that some clusters' admission tolerates by itself.
    """
    labelled = [node for node in nodes if selector.items() <= (node.metadata.labels or {}).items()]
    if not labelled:
        labels = ", ".join(f"{key}={value}" for key, value in selector.items()) or "of any kind"
        raise UserError(f"no node has the labels {labels}: correct [cluster] gpu_node_selector, unless an autoscaler "
                        "makes such nodes when they are asked for")  # fmt: skip
    counts = {node.metadata.name: _count(node, resource) for node in labelled}
    most = max(counts.values())
    if most < wanted:
        others = sorted({name for node in nodes for name in node.status.allocatable or {} if "/" in name})
        hint = f"; extended resources there: {', '.join(others)}" if not most and others else ""
        raise UserError(f"the largest of {len(labelled)} nodes has {most} of {resource}: ask for fewer GPUs "
                        f"([check] gpus), or add a node{hint}")  # fmt: skip
    taints = {
        node.metadata.name: _repelling(node, tolerations) for node in labelled if _count(node, resource) >= wanted
    }
    open_to_it = [name for name, found in taints.items() if not found]
    if not open_to_it:
        name, found = min(taints.items(), key=lambda item: len(item[1]))
        words = ", ".join(f"{taint.key}={taint.value or ''}:{taint.effect}" for taint in found)
        if {taint.key for taint in found} == {resource}:
            raise NotChecked(f"node {name} has the taint {words}: tolerate it in [cluster] gpu_tolerations, unless the "
                             "cluster's admission does by itself (ExtendedResourceToleration)")  # fmt: skip
        raise UserError(f"node {name} has the taint {words}: tolerate it in [cluster] gpu_tolerations, or lift it")
    return f"{sum(counts.values())} on {sum(count > 0 for count in counts.values())} nodes, {most} on the largest"


def _count(node: Any, resource: str) -> int:
    return int((node.status.allocatable or {}).get(resource, 0))


def _repelling(node: Any, tolerations: Sequence[Toleration]) -> list[Any]:
    taints = [taint for taint in node.spec.taints or [] if taint.effect in _REPELS]
    return [taint for taint in taints if not any(_tolerates(toleration, taint) for toleration in tolerations)]


def _tolerates(toleration: Toleration, taint: Any) -> bool:
    """As Kubernetes' scheduler reads it: https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/."""
    return (
        toleration.effect in ("", taint.effect)
        and toleration.key in ("", taint.key)
        and (toleration.operator == "Exists" or toleration.value == (taint.value or ""))
    )
