"""The pipeline's renderings: written by `python -m pipelines compile`, checked in for one config, and compared."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.config import RunConfig
from pipelines.placement import require_no_password, require_reachable
from tuneloop.errors import UserError

COMPILED = Path(__file__).resolve().parent / "compiled"
CONFIG = COMPILED.parent.parent / "configs" / "cluster.toml"
TARGETS = ("kubernetes", "portable", "argo", "gitops")
Package = Callable[[], str]
KUBERNETES, PORTABLE, GITOPS = "kubernetes.yaml", "portable.yaml", "gitops.yaml"
WORKFLOW_TEMPLATE, CRON_WORKFLOW, KUSTOMIZATION = "workflow_template.yaml", "cron_workflow.yaml", "kustomization.yaml"


def render(config: RunConfig, targets: tuple[str, ...] = TARGETS) -> dict[str, str]:
    """The renderings of a config.

    Returns:
        File name -> content.

    Raises:
        UserError: the config cannot run on a cluster, or not on a target.
    """
    require_reachable(config)
    require_no_password(config)
    from pipelines.kfp_rendering import kubernetes_package

    package = functools.cache(lambda: kubernetes_package(config))  # several renderings are made from it
    return {file: text for target in targets for file, text in _RENDERERS[target](config, package).items()}


def compile_pipeline(config: RunConfig, folder: Path = COMPILED, targets: tuple[str, ...] = TARGETS) -> list[Path]:
    """Write the renderings of a config into `folder`; nothing is written when one is refused.

    Raises:
        UserError: as `render`, or the folder cannot be written.
    """
    rendered = render(config, targets)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in rendered.items():
            (folder / file).write_text(text, encoding="utf-8")
        if KUSTOMIZATION in rendered and CRON_WORKFLOW not in rendered:
            (folder / CRON_WORKFLOW).unlink(missing_ok=True)  # of a schedule that there is no more
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written ({error.strerror}); choose another folder") from None
    return [folder / file for file in rendered]


def check_compiled(config: RunConfig, folder: Path = COMPILED, targets: tuple[str, ...] = TARGETS) -> None:
    """Compare what `folder` holds with what the config renders to now, whatever the SDK's version.

    Raises:
        UserError: they differ, or a file is missing.
    """
    import yaml

    from pipelines.kfp_rendering import package_content

    for file, text in render(config, targets).items():
        path = folder / file
        try:
            is_equal = package_content(path.read_text(encoding="utf-8")) == package_content(text)
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            is_equal = False  # missing, or damaged
        if not is_equal:
            raise UserError(f"{path} is not what the pipeline compiles to; run `python -m pipelines compile`")


def _kubernetes(config: RunConfig, package: Package) -> dict[str, str]:
    return {KUBERNETES: package()}


def _portable(config: RunConfig, package: Package) -> dict[str, str]:
    from pipelines.kfp_rendering import portable_package

    return {PORTABLE: portable_package(config)}


def _gitops(config: RunConfig, package: Package) -> dict[str, str]:
    from pipelines.kfp_rendering import gitops_objects

    return {GITOPS: gitops_objects(config, package())}


def _argo(config: RunConfig, package: Package) -> dict[str, str]:
    import yaml

    from pipelines.argo import argo_objects

    kinds = {"WorkflowTemplate": WORKFLOW_TEMPLATE, "CronWorkflow": CRON_WORKFLOW}
    files: dict[str, Any] = {kinds[found["kind"]]: found for found in argo_objects(config, package())}
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": [*files]}
    objects = files | {KUSTOMIZATION: kustomization}
    return {file: yaml.safe_dump(found, sort_keys=False, width=math.inf) for file, found in objects.items()}


_RENDERERS: dict[str, Callable[[RunConfig, Package], dict[str, str]]] = {
    "kubernetes": _kubernetes,
    "portable": _portable,
    "argo": _argo,
    "gitops": _gitops,
}
