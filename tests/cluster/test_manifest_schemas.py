"""Every rendering is built by kubectl and taken, field for field, by the APIs that it is for."""

import copy
import itertools
from pathlib import Path

import pytest

from tests.cluster.rendering import EITHER_OR, OPTIONAL, OVERLAYS, Manifest, build, combination, named, overlay
from tests.cluster.schemas import KUBERNETES_VERSIONS, custom_resources, problems

CLUSTER_SCOPED = {"Namespace"}


def wrong(manifests: list[Manifest], version: str) -> list[str]:
    return [f"{found['kind']} {found['metadata']['name']}: {problem}"
            for found in manifests for problem in problems(found, version)]  # fmt: skip


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_valid(name: str, version: str):
    assert len(overlay(name)) > 15
    assert wrong(overlay(name), version) == []


def test_every_combination_of_components_is_valid(tmp_path: Path):
    sets = [chosen for size in range(len(OPTIONAL) + 1) for chosen in itertools.combinations(OPTIONAL, size)]
    sets = [chosen for chosen in sets if not set(chosen) >= EITHER_OR]
    assert len(sets) >= 8
    for chosen in sets:
        manifests = combination(chosen, tmp_path)
        assert wrong(manifests, KUBERNETES_VERSIONS[-1]) == [], chosen
        names = [(found["kind"], found["metadata"]["name"]) for found in manifests]
        assert len(names) == len(set(names)), chosen


@pytest.mark.parametrize("components", [("argo", "kueue", "serving", "trainer"), ("kserve",)])
def test_what_belongs_to_a_namespace_is_in_ours(components: tuple[str, ...], tmp_path: Path):
    for found in combination(components, tmp_path):
        definition = custom_resources().get((found["apiVersion"], found["kind"]))
        cluster_scoped = definition["scope"] == "Cluster" if definition else found["kind"] in CLUSTER_SCOPED
        assert found["metadata"].get("namespace") == (None if cluster_scoped else "tuneloop"), found["metadata"]["name"]


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("NetworkPolicy", ("spec", "ingres")),
        ("ResourceQuota", ("spec", "hards")),
        ("ServiceAccount", ("automountToken",)),
        ("Role", ("rules", 0, "resource")),
        ("ClusterQueue", ("spec", "resourceGroups", 0, "flavors", 0, "quota")),
        ("LocalQueue", ("spec", "queue")),
        ("ResourceFlavor", ("spec", "labels")),
        ("ClusterTrainingRuntime", ("spec", "template", "spec", "replicatedJobs", 0, "template", "spec", "template",
                                    "spec", "containers", 0, "privileged")),
        ("ClusterTrainingRuntime", ("spec", "template", "spec", "podFailurePolicy")),
        ("ClusterTrainingRuntime", ("metadata", "label")),
    ],
)  # fmt: skip
def test_an_unknown_field_is_refused_wherever_it_is(kind: str, path: tuple):
    found = copy.deepcopy(next(iter(named(overlay("prod"), kind).values())))
    place = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = "anything"
    assert path[-1] in " ".join(problems(found, KUBERNETES_VERSIONS[-1]))


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("ClusterQueue", ("spec", "queueingStrategy"), "Fair"),
        ("ClusterTrainingRuntime", ("spec", "mlPolicy", "numNodes"), "two"),
        ("NetworkPolicy", ("spec", "policyTypes"), "Ingress"),
        ("WorkloadPriorityClass", ("value",), "high"),
    ],
)
def test_a_wrong_value_is_refused(kind: str, path: tuple, value: object):
    found = copy.deepcopy(next(iter(named(overlay("prod"), kind).values())))
    place = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert problems(found, KUBERNETES_VERSIONS[-1])


@pytest.mark.parametrize("path", [("spec", "predictor", "replicas"), ("spec", "predictor", "containers", 1, "images")])
def test_an_unknown_field_of_kserve_is_refused(path: tuple, tmp_path: Path):
    found = named(combination(("kserve",), tmp_path), "InferenceService")["tuneloop-serving"]
    assert problems(found, KUBERNETES_VERSIONS[0]) == []
    place = found
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = 1
    assert path[-1] in " ".join(problems(found, KUBERNETES_VERSIONS[0]))


def test_a_kind_that_no_schema_knows_is_refused():
    unknown = {"apiVersion": "kueue.x-k8s.io/v1beta9", "kind": "ClusterQueue", "metadata": {"name": "x"}}
    assert "schema" in problems(unknown, KUBERNETES_VERSIONS[0])[0]


def test_a_secret_is_made_from_a_file_that_git_ignores(tmp_path: Path):
    """The recipe of components/secrets, with a file of our own in the place of the user's."""
    import base64
    import shutil
    import subprocess

    from tests.cluster.rendering import MANIFESTS

    for example in sorted(MANIFESTS.glob("components/secrets/*/*.env.example")):
        folder = tmp_path / example.parent.name
        shutil.copytree(example.parent, folder)
        keys = [line.partition("=")[0] for line in example.read_text().splitlines() if line and line[0] != "#"]
        assert all(line.endswith("=") for line in example.read_text().splitlines() if line and line[0] != "#")
        (folder / example.name.removesuffix(".example")).write_text("".join(f"{key}=value\n" for key in keys))
        top = tmp_path / f"top-{folder.name}"
        top.mkdir()
        (top / "kustomization.yaml").write_text(f"components: [../{folder.name}]\n")
        [secret] = build(top)
        assert problems(secret, KUBERNETES_VERSIONS[-1]) == []
        assert (secret["kind"], secret["metadata"]["namespace"]) == ("Secret", "tuneloop")
        assert {key: base64.b64decode(value) for key, value in secret["data"].items()} == dict.fromkeys(keys, b"value")
        ignored = subprocess.run(["git", "check-ignore", str(example.with_suffix(""))], cwd=MANIFESTS)
        assert ignored.returncode == 0
