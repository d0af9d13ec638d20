"""The credentials with which Kubernetes' API is called: a pod's own, or those of a kubeconfig."""

import os
from typing import Any

IN_CLUSTER = "KUBERNETES_SERVICE_HOST"  # set in every pod


class Unusable(Exception):
    """There are no credentials, or they cannot be read; the message is the reason in a few words."""


def configuration(context: str = "", *, of_the_pod: bool) -> Any:
    """kubernetes' Configuration, which repeats no request by itself: `ApiServer` does.

    Args:
        context: of the kubeconfig; empty: its current one.
        of_the_pod: take the pod's service account, and no kubeconfig.

    Raises:
        Unusable: see there.
    """
    import kubernetes

    found = kubernetes.client.Configuration()
    try:
        if of_the_pod:
            kubernetes.config.load_incluster_config(client_configuration=found)
        else:
            kubernetes.config.load_kube_config(
                config_file=_kubeconfig(), context=context or None, client_configuration=found
            )
    except _reading_problems() as error:
        raise Unusable(_reason(error)) from None
    found.retries = False  # pyright: ignore[reportAttributeAccessIssue] - untyped
    return found


def contexts() -> tuple[list[str], bool]:
    """The names of the kubeconfig's contexts, and whether one of them is the current one.

    Raises:
        Unusable: see there.
    """
    import kubernetes

    try:
        found, active = kubernetes.config.list_kube_config_contexts(config_file=_kubeconfig())
        return [str(context["name"]) for context in found], bool(active)  # pyright: ignore - untyped
    except _reading_problems() as error:
        raise Unusable(_reason(error)) from None


def _kubeconfig() -> str | None:
    return os.environ.get("KUBECONFIG") or None  # kubernetes itself reads the variable when it is imported


def _reading_problems() -> tuple[type[Exception], ...]:
    """What kubernetes raises on a file that is missing, no YAML, or YAML of another kind."""
    import kubernetes
    import yaml

    named = (kubernetes.config.ConfigException, OSError, yaml.YAMLError)
    return (*named, TypeError, KeyError, AttributeError, ValueError)


def _reason(error: Exception) -> str:
    if isinstance(error, (TypeError, KeyError, AttributeError)):
        return "it is no kubeconfig"
    return " ".join(str(error).split())[:240]
