"""Whether what a run asks for at once is within the quotas of its namespace and its queue, had it them for itself."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from components.cluster_config import QUEUE_LABEL
from components.config import RunConfig
from pipelines.cluster.not_checked import NotChecked
from pipelines.placement import place
from pipelines.steps import STEP_NAMES
from tuneloop.errors import UserError

_IN_BYTES = ("memory", "ephemeral-storage")
_FEWER = "ask for less ([cluster.steps], [check] gpus, lora_rl.distributed.trainjob)"

Amounts = dict[str, Decimal]  # by resource, in its own unit: CPUs, bytes, GPUs


@dataclass(frozen=True)
class Defaults:
    """What a namespace's LimitRanges give a container that says nothing: requests, and limits."""

    requests: Amounts
    limits: Amounts


@dataclass(frozen=True)
class Demand:
    """What pods that run together ask for; `queued` of it is what Kueue has to admit at once."""

    what: str
    asks: Amounts
    queued: Amounts


def defaults_of(limit_ranges: Sequence[Any]) -> Defaults:
    """The defaults of kubernetes' V1LimitRanges, of which a limit is a request too where no other one is given."""
    requests: dict[str, Decimal] = {}
    limits: dict[str, Decimal] = {}
    for item in (item for found in limit_ranges for item in found.spec.limits if item.type == "Container"):
        limits |= _parsed(item.default)
        requests |= _parsed(item.default) | _parsed(item.default_request)
    return Defaults(requests, limits)


def demands(config: RunConfig, defaults: Defaults) -> list[Demand]:
    """What the steps of a run ask for, one after the other; of a TrainJob, all nodes and the step that follows them.

    A step's pod has a container of the backend's beside the step's own.
    """
    found = []
    for step in STEP_NAMES:
        it = place(config, step, "")
        own = _amounts(it.cpu, it.memory, it.gpu_resource, it.gpus)
        asks = _sum(defaults.requests | own, defaults.requests)
        found.append(Demand(step, asks, asks if QUEUE_LABEL in it.labels else {}))
    if config.lora_rl.distributed.launcher == "trainjob":
        node = config.lora_rl.distributed.trainjob
        one = defaults.requests | _amounts(node.cpu, node.memory, config.cluster.gpu_resource, node.gpus)
        nodes = {resource: node.nodes * amount for resource, amount in one.items()}
        launcher = next(demand.asks for demand in found if demand.what == "lora_rl")
        queued = nodes if config.cluster.queue else {}
        found.append(Demand(f"lora_rl on {node.nodes} nodes", _sum(nodes, launcher), queued))
    return found


def look_at_quotas(quotas: Sequence[Any], wanted: Sequence[Demand], defaults: Defaults) -> str:
    """Compare with all of a namespace's quotas.

    Args:
        quotas: kubernetes' V1ResourceQuota; one for a kind of pods alone (scopes) is passed over.

    Raises:
        UserError: one grants less than is asked for, or refuses every container.
    """
    for quota in (one for one in quotas if not (one.spec.scopes or one.spec.scope_selector)):
        hard = _parsed(quota.spec.hard)
        name = f"resource quota {quota.metadata.name}"
        if "limits.cpu" in hard and "cpu" not in defaults.limits:
            raise UserError(f"{name} counts limits.cpu, and steps have no limit of CPUs, so it refuses them: have it "
                            "lifted, or a LimitRange give a default")  # fmt: skip
        granted = {resource.removeprefix("requests."): amount for resource, amount in hard.items()}
        if "limits.memory" in hard:  # a step's limit is its request
            granted["memory"] = min(hard["limits.memory"], granted.get("memory", hard["limits.memory"]))
        for demand in wanted:
            if short := _beyond(demand.asks, granted):
                raise UserError(f"{demand.what} asks for {short} in {name}: {_FEWER}, or have the quota raised "
                                "(manifests/base/quota.yaml)")  # fmt: skip
    return f"{_most(one.asks for one in wanted)} at once at the most, within {len(quotas)} resource quotas"


def look_at_cluster_queue(name: str, spec: Mapping[str, Any], wanted: Sequence[Demand]) -> str:
    """Compare with what Kueue may admit at once.

    Pods of one kind take all resources of a group from one flavor:
    https://kueue.sigs.k8s.io/docs/concepts/cluster_queue/#resource-groups.

    Args:
        name, spec: of the ClusterQueue, v1beta2.

    Raises:
        UserError: no flavor has what is asked for.
        NotChecked: it may have to be borrowed, or Kueue's configuration decides.
    """
    queued = [demand for demand in wanted if demand.queued]
    groups = spec.get("resourceGroups") or []
    covered = {resource for group in groups for resource in group["coveredResources"]}
    doubts = [_look_at_flavors(name, group, demand, spec.get("cohortName")) for demand in queued for group in groups]
    for demand in queued:
        if missing := sorted(set(demand.queued) - covered):
            doubts.append(f"{demand.what} is never admitted: cluster queue {name} covers no {', '.join(missing)}; "
                          "unless Kueue is configured not to count that (excludeResourcePrefixes)")  # fmt: skip
    if any(doubts):
        raise NotChecked(next(filter(None, doubts)))
    return f"{_most(one.queued for one in queued)} at once at the most, within cluster queue {name}"


def _look_at_flavors(name: str, group: Mapping[str, Any], demand: Demand, cohort: str | None) -> str:
    """What may keep the demand waiting; empty when a flavor has all of it."""
    flavors = group["flavors"]
    asks = {resource: amount for resource, amount in demand.queued.items() if resource in group["coveredResources"]}
    short = [_beyond(asks, _nominal(flavor)) for flavor in flavors]
    if not all(short):
        return ""
    if cohort and not all(_beyond(asks, _with_loans(flavor)) for flavor in flavors):
        return (
            f"{demand.what} asks for {short[0]} in cluster queue {name}: it waits until cohort {cohort} lends the rest"
        )
    raise UserError(f"{demand.what} asks for {short[0]} in cluster queue {name}, which would never admit it: {_FEWER}, "
                    "or have its quota raised (manifests/components/kueue/cluster-queue.yaml)")  # fmt: skip


def _amounts(cpu: str, memory: str, gpu_resource: str, gpus: int) -> Amounts:
    asked = {"cpu": _number(cpu), "memory": _number(memory)}
    return asked | ({gpu_resource: Decimal(gpus)} if gpus else {})


def _nominal(flavor: Mapping[str, Any]) -> Amounts:
    return {one["name"]: _number(one["nominalQuota"]) for one in flavor["resources"]}


def _with_loans(flavor: Mapping[str, Any]) -> Amounts:
    """What a flavor has with all that it may borrow; without a limit, no end."""
    return {
        one["name"]: _number(one["nominalQuota"]) + _number(one.get("borrowingLimit", "Infinity"))
        for one in flavor["resources"]
    }


def _beyond(asks: Amounts, granted: Amounts) -> str:
    """`16 of 8 nvidia.com/gpu` for what is not granted; nothing when all is. What is not named is granted."""
    return ", ".join(
        f"{_text(resource, amount)} of {_text(resource, granted[resource])} {resource}"
        for resource, amount in asks.items()
        if amount > granted.get(resource, amount)
    )


def _most(wanted: Iterable[Amounts]) -> str:
    most: dict[str, Decimal] = {}
    for asks in wanted:
        most |= {resource: max(amount, most.get(resource, amount)) for resource, amount in asks.items()}
    return ", ".join(f"{_text(resource, amount)} {resource}" for resource, amount in most.items()) or "nothing"


def _sum(one: Amounts, other: Amounts) -> Amounts:
    return {name: one.get(name, Decimal(0)) + other.get(name, Decimal(0)) for name in {**one, **other}}


def _parsed(quantities: Mapping[str, str] | None) -> dict[str, Decimal]:
    return {resource: _number(quantity) for resource, quantity in (quantities or {}).items()}


def _text(resource: str, amount: Decimal) -> str:
    return f"{amount / 2**30:.6g}Gi" if resource in _IN_BYTES else f"{amount.normalize():f}"


def _number(quantity: str | int) -> Decimal:
    from kubernetes.utils.quantity import parse_quantity

    return Decimal(quantity) if quantity == "Infinity" else parse_quantity(quantity)
