"""What the manifests let an account do, and which right a request to Kubernetes' API takes.

https://kubernetes.io/docs/reference/access-authn-authz/authorization/#determine-the-request-verb
"""

import functools
import itertools
import re
from collections.abc import Iterable
from typing import Any

import yaml
from werkzeug.wrappers import Request

from tests.cluster.rendering import MANIFESTS, Manifest, named

Right = tuple[str, str, str]  # API group, resource (with /name where only that one is meant), verb

_PATH = re.compile(
    r"/(api/v1|apis/(?P<group>[^/]+)/[^/]+)(/namespaces/(?P<namespace>[^/]+))?"
    r"(/(?P<resource>[^/]+)(/(?P<name>[^/]+)(/(?P<part>[^/]+))?)?)?"
)
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
# `doctor` says that it may not look, where a user may not; what everybody may ask about themselves
_BESIDE = {
    ("", "namespaces", "get"), ("", "nodes", "list"), ("", "secrets", "get"), ("", "serviceaccounts", "get"),
    ("trainer.kubeflow.org", "clustertrainingruntimes", "get"), ("kueue.x-k8s.io", "workloadpriorityclasses", "get"),
    ("kueue.x-k8s.io", "clusterqueues", "get"),
    ("authorization.k8s.io", "selfsubjectaccessreviews", "create"),
}  # fmt: skip


def granted(manifests: list[Manifest]) -> dict[str, set[Right]]:
    """Service account -> its rights, by the roles that are bound to it."""
    roles, rights = named(manifests, "Role"), {}
    for name in named(manifests, "ServiceAccount"):
        rights[name] = set()
    for binding in named(manifests, "RoleBinding").values():
        assert binding["roleRef"]["kind"] == "Role"
        for subject in binding["subjects"]:
            assert subject["namespace"] == "tuneloop"
            for rule in roles[binding["roleRef"]["name"]]["rules"]:
                rights[subject["name"]] |= set(itertools.product(rule["apiGroups"], _resources(rule), rule["verbs"]))
    return rights


def _resources(rule: dict[str, Any]) -> Iterable[str]:
    names = rule.get("resourceNames", [""])
    return [f"{resource}/{name}" if name else resource for resource in rule["resources"] for name in names]


@functools.cache
def _base() -> dict[str, set[Right]]:
    files = sorted((MANIFESTS / "base").glob("*.yaml"))
    return granted([found for file in files for found in yaml.safe_load_all(file.read_text()) if "metadata" in found])


def missing(request: Request, account: str) -> list[str]:
    """What an API server would say that asks whether an account may do this; nothing when it may."""
    match = _PATH.fullmatch(request.path)
    if not match or not (match["resource"] or match["namespace"]):
        return []
    resource, name = (match["resource"], match["name"]) if match["resource"] else ("namespaces", match["namespace"])
    reading = "get" if name else "watch" if request.args.get("watch") else "list"
    resource = f"{resource}/{match['part']}" if match["part"] else resource
    right = (match["group"] or "", resource, _VERBS.get(request.method, reading))
    return [] if right in _base()[account] | _BESIDE else [f"{account} may not: {' '.join(right)}"]
