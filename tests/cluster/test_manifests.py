"""What every rendering promises: no secret, no privilege, least rights, nothing reached that is not named."""

import itertools
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from components import images
from tests.cluster.rendering import (
    ARGO_EXECUTOR,
    MANIFESTS,
    OPTIONAL,
    OVERLAYS,
    Manifest,
    build,
    combination,
    named,
    overlay,
    pod_specs,
)
from tests.cluster.rights import granted
from tuneloop import __version__
from tuneloop.errors import EXIT_USER_ERROR

EVERYTHING = tuple(name for name in OPTIONAL if name != "kserve")
README = (MANIFESTS / "README.md").read_text()


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> list[Manifest]:
    """Base with every component but KServe's, which takes the place of serving."""
    return combination(EVERYTHING, tmp_path_factory.mktemp("all"))


@pytest.fixture(scope="module")
def kserve(tmp_path_factory) -> list[Manifest]:
    """Base with KServe's serving."""
    return combination(("kserve",), tmp_path_factory.mktemp("kserve"))


@pytest.fixture(params=[*OVERLAYS, "everything", "kserve"])
def manifests(request) -> list[Manifest]:
    return overlay(request.param) if request.param in OVERLAYS else request.getfixturevalue(request.param)


def everywhere(value: Any, key: str) -> list[Any]:
    """Every value that a field of this name has, at any depth."""
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [value[key]] if isinstance(value, dict) and key in value else []
    return found + [deeper for child in children for deeper in everywhere(child, key)]


def test_no_rendering_holds_a_secret(manifests: list[Manifest]):
    assert not named(manifests, "Secret")
    for variable in itertools.chain.from_iterable(everywhere(manifests, "env")):
        if re.search("KEY|SECRET|TOKEN|PASSWORD", variable["name"]):
            assert "value" not in variable, variable["name"]
    for config in named(manifests, "ConfigMap").values():
        assert not [key for key in config["data"] if re.search("KEY|SECRET|TOKEN|PASSWORD", key)]


def test_every_image_has_a_tag_that_stays(manifests: list[Manifest]):
    for image in everywhere(manifests, "image"):
        assert re.search(r":[^/:]+$|@sha256:[0-9a-f]{64}$", image), image
        assert not image.endswith(":latest"), image


def test_the_images_are_those_that_the_steps_run_in(everything: list[Manifest]):
    assert set(everywhere(everything, "image")) == {images.BASE_IMAGE, images.TRAIN_IMAGE}


def not_restricted(spec: Manifest) -> list[str]:
    """How a pod spec breaks the restricted profile of the Pod Security Standards."""
    pod, wrong = spec.get("securityContext", {}), []
    wrong += [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    wrong += [
        f"volume {set(volume) - {'name'}}"
        for volume in spec.get("volumes", ())
        if not set(volume) - {"name"} <= allowed
    ]
    wrong += ["sysctls"] if pod.get("sysctls") else []
    for container in [*spec["containers"], *spec.get("initContainers", ()), *spec.get("ephemeralContainers", ())]:
        context = {**pod, **container.get("securityContext", {})}
        capabilities = context.get("capabilities", {})
        checks = {
            "privileged": not context.get("privileged"),
            "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is False,
            "drop": "ALL" in capabilities.get("drop", ()),
            "add": set(capabilities.get("add", ())) <= {"NET_BIND_SERVICE"},
            "runAsNonRoot": context.get("runAsNonRoot") is True,
            "runAsUser": context.get("runAsUser") != 0,
            "seccomp": context.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "procMount": context.get("procMount", "Default") == "Default",
            "hostPort": not any(port.get("hostPort") for port in container.get("ports", ())),
        }
        if container["image"] == ARGO_EXECUTOR:
            checks["image's user"] = context.get("runAsUser", 0) != 0
        else:  # ours: stricter than the profile
            checks["readOnlyRootFilesystem"] = context.get("readOnlyRootFilesystem") is True
        wrong += [f"{container['name']}: {name}" for name, kept in checks.items() if not kept]
    return wrong


def test_every_pod_is_restricted(manifests: list[Manifest]):
    for found in manifests:
        for path, spec in pod_specs(found):
            assert not_restricted(spec) == [], (found["metadata"]["name"], path)


def test_kserve_gets_the_pod_of_the_deployment(everything: list[Manifest], kserve: list[Manifest]):
    assert not named(kserve, "Deployment")
    assert not named(kserve, "Service")
    predictor = dict(named(kserve, "InferenceService")["tuneloop-serving"]["spec"]["predictor"])
    template = named(everything, "Deployment")["tuneloop-serving"]["spec"]["template"]
    assert predictor.pop("labels").items() <= template["metadata"]["labels"].items()
    assert (predictor.pop("minReplicas"), predictor.pop("maxReplicas")) == (1, 1)
    assert predictor["containers"][0].pop("name") == "kserve-container"
    assert {**template["spec"]["containers"][0], **predictor["containers"][0]} == template["spec"]["containers"][0]
    predictor["containers"][0]["name"] = "vllm"
    assert predictor == template["spec"]  # what was not copied would be missing here
    [config] = named(kserve, "ConfigMap")
    assert everywhere(predictor, "configMapRef") == [{"name": config}] * 3


def test_the_namespace_lets_no_other_pod_in(manifests: list[Manifest]):
    labels = named(manifests, "Namespace")["tuneloop"]["metadata"]["labels"]
    for mode in ("enforce", "audit", "warn"):
        assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
        assert re.fullmatch(r"v1\.\d+", labels[f"pod-security.kubernetes.io/{mode}-version"])
    assert not [label for label in labels if label.startswith("app.kubernetes.io/")]


def test_a_pod_that_is_not_restricted_would_be_seen(everything: list[Manifest]):
    [(_, spec)] = pod_specs(named(everything, "Deployment")["tuneloop-serving"])
    first, *rest = spec["containers"]
    context = first["securityContext"]
    for changed in (
        {"volumes": [{"name": "x", "hostPath": {"path": "/"}}]},
        {"hostNetwork": True},
        {"securityContext": {**spec["securityContext"], "runAsNonRoot": False}},
        {"containers": [{**first, "securityContext": {**context, "privileged": True}}, *rest]},
        {"containers": [{**first, "securityContext": {**context, "capabilities": {}}}, *rest]},
        {"containers": [{**first, "ports": [{"containerPort": 1, "hostPort": 1}]}, *rest]},
    ):
        assert not_restricted({**spec, **changed}), changed


def test_rights_are_named_one_by_one_and_end_at_the_namespace(manifests: list[Manifest]):
    assert not named(manifests, "ClusterRole")
    assert not named(manifests, "ClusterRoleBinding")
    for name, role in named(manifests, "Role").items():
        assert "*" not in str(role["rules"]), name


def test_each_account_may_do_what_its_pods_do_and_no_more(everything: list[Manifest]):
    rights = granted(everything)
    watching = {"get", "list", "watch"}
    kubeflow = {
        ("", "configmaps/kfp-launcher", "get"), ("", "secrets/mlpipeline-minio-artifact", "get"),
        *(("", "pods", verb) for verb in watching),
        ("pipelines.kubeflow.org", "runs", "list"), ("pipelines.kubeflow.org", "runs", "createTask"),
        ("argoproj.io", "workflowtasksets", "list"), ("argoproj.io", "workflowtasksets", "watch"),
        ("argoproj.io", "workflowtasksets/status", "patch"),
    }  # fmt: skip
    step = kubeflow | {
        ("argoproj.io", "workflowtaskresults", "create"),
        ("argoproj.io", "workflowtaskresults", "patch"),
    }
    assert rights["tuneloop-step"] == step
    assert rights["tuneloop-launcher"] == step | {
        *(("trainer.kubeflow.org", "trainjobs", verb) for verb in ("get", "watch", "create", "delete")),
        ("", "pods/log", "get"),
    }
    assert rights["tuneloop-trainer"] == rights["tuneloop-server"] == set()
    submitter = rights["tuneloop-submitter"]
    assert not {
        right for right in submitter if right[1].startswith(("secrets", "configmaps", "roles", "serviceaccounts"))
    }
    changing = {right for right in submitter if right[2] not in watching}
    assert {group for group, _, _ in changing} == {"pipelines.kubeflow.org", "argoproj.io"}


def test_accounts_queues_and_priorities_that_are_named_are_there(everything: list[Manifest]):
    for key in ("serviceAccountName", "serviceAccount"):
        assert set(everywhere(everything, key)) <= set(named(everything, "ServiceAccount"))
    assert set(everywhere(everything, "kueue.x-k8s.io/queue-name")) <= set(named(everything, "LocalQueue"))
    assert set(everywhere(everything, "kueue.x-k8s.io/priority-class")) <= set(
        named(everything, "WorkloadPriorityClass")
    )
    assert any(spec for found in named(everything, "WorkflowTemplate").values() for spec in pod_specs(found))


def test_tokens_are_mounted_only_where_they_are_used(everything: list[Manifest]):
    accounts = named(everything, "ServiceAccount")
    mounting = {name for name, account in accounts.items() if account["automountServiceAccountToken"]}
    assert mounting == {"tuneloop-step", "tuneloop-launcher"}
    for found in (*named(everything, "Deployment").values(), *named(everything, "ClusterTrainingRuntime").values()):
        for _, spec in pod_specs(found):
            assert spec["serviceAccountName"] in accounts
            assert spec["automountServiceAccountToken"] is False


def test_nothing_goes_in_or_out_but_by_a_named_exception(manifests: list[Manifest]):
    policies = named(manifests, "NetworkPolicy")
    deny = policies.pop("deny-all")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        assert name.startswith("allow-")
        assert f"| `{name}` |" in README, name
        spec = policy["spec"]
        assert {kind.lower() for kind in spec["policyTypes"]} == set(spec) - {"podSelector", "policyTypes"}
        for rule in (*spec.get("ingress", ()), *spec.get("egress", ())):
            inside = everywhere(rule, "podSelector") and not everywhere(rule, "namespaceSelector")
            assert rule.get("ports") or inside, f"{name} opens every port to others"
        for rule in spec.get("ingress", ()):
            assert rule["from"], name


def test_every_exception_that_the_readme_names_is_there(everything: list[Manifest]):
    assert set(re.findall(r"\| `(allow-[a-z-]+)` \|", README)) == set(named(everything, "NetworkPolicy")) - {"deny-all"}


def test_every_queue_leads_somewhere_and_covers_what_a_node_asks_for(everything: list[Manifest]):
    queues, flavors = named(everything, "ClusterQueue"), named(everything, "ResourceFlavor")
    [local] = named(everything, "LocalQueue").values()
    queue = queues[local["spec"]["clusterQueue"]]
    [group] = queue["spec"]["resourceGroups"]
    assert set(group["coveredResources"]) == {"cpu", "memory", "ephemeral-storage", "nvidia.com/gpu"}
    for flavor in group["flavors"]:
        assert flavor["name"] in flavors
        assert [resource["name"] for resource in flavor["resources"]] == group["coveredResources"]
    labels = named(everything, "Namespace")["tuneloop"]["metadata"]["labels"]
    assert queue["spec"]["namespaceSelector"]["matchLabels"].items() <= labels.items()


def test_the_quota_bounds_gpus_and_what_asks_for_nothing_is_counted(manifests: list[Manifest]):
    hard = named(manifests, "ResourceQuota")["tuneloop"]["spec"]["hard"]
    assert int(hard["requests.nvidia.com/gpu"]) > 0
    assert hard.keys() >= {f"requests.{name}" for name in ("cpu", "memory", "ephemeral-storage")}
    [limits] = named(manifests, "LimitRange")["tuneloop"]["spec"]["limits"]
    counted = {key.removeprefix("requests.") for key in hard if key.startswith("requests.")} - {"nvidia.com/gpu"}
    assert set(limits["defaultRequest"]) == counted
    assert "default" not in limits  # a default limit under a step's request would have its pod refused


def test_what_the_queue_admits_fits_into_the_quota_beside_what_is_not_queued(everything: list[Manifest]):
    """Serving at a roll-out, and the largest step without a GPU."""
    hard = named(everything, "ResourceQuota")["tuneloop"]["spec"]["hard"]
    [group] = named(everything, "ClusterQueue")["tuneloop"]["spec"]["resourceGroups"]
    queued = {one["name"]: one["nominalQuota"] for one in group["flavors"][0]["resources"]}
    [(_, serving)] = pod_specs(named(everything, "Deployment")["tuneloop-serving"])
    [template] = named(everything, "WorkflowTemplate").values()
    steps = [spec for _, spec in pod_specs(template) if "nvidia.com/gpu" not in str(spec)]
    for name, quota in queued.items():
        beside = 2 * asked(serving, name) + max(asked(spec, name) for spec in steps)
        assert amount(hard[f"requests.{name}"]) >= amount(quota) + beside, name


def asked(spec: Manifest, resource: str) -> float:
    """What the containers of a pod request of a resource."""
    return sum(amount(container.get("resources", {}).get("requests", {}).get(resource, "0"))
               for container in spec["containers"])  # fmt: skip


def amount(quantity: str) -> float:
    """A quantity of Kubernetes as a number."""
    number, unit = re.fullmatch(r"([\d.]+)(\w*)", quantity).groups()  # type: ignore[union-attr]
    return float(number) * {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


def test_images_of_a_private_registry_are_pulled_for_every_pod(everything: list[Manifest]):
    for name, account in named(everything, "ServiceAccount").items():
        wanted = [] if name == "tuneloop-submitter" else [{"name": "tuneloop-registry"}]
        assert account.get("imagePullSecrets", []) == wanted, name


def test_training_nodes_are_what_the_trainer_looks_for(everything: list[Manifest]):
    runtime = named(everything, "ClusterTrainingRuntime")["tuneloop"]
    assert runtime["metadata"]["labels"]["trainer.kubeflow.org/framework"] == "torch"
    [job] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    [(_, spec)] = pod_specs(job)
    [container] = spec["containers"]
    assert container["name"] == "node"
    labels = job["template"]["spec"]["template"]["metadata"]["labels"]
    assert labels["sidecar.istio.io/inject"] == "false"  # a proxy would outlive the node, and is not restricted
    assert {"/dev/shm", "/scratch"} == {mount["mountPath"] for mount in container["volumeMounts"]}


def test_all_nodes_start_again_together_unless_it_was_a_mistake(everything: list[Manifest]):
    jobs = named(everything, "ClusterTrainingRuntime")["tuneloop"]["spec"]["template"]["spec"]
    assert jobs["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    [rule] = jobs["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    node = jobs["replicatedJobs"][0]["template"]["spec"]
    assert (node["backoffLimit"], node["template"]["spec"]["restartPolicy"]) == (0, "Never")
    [rule] = node["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [EXIT_USER_ERROR])


@pytest.mark.parametrize(("component", "count"), [("serving", 2), ("kserve", 2), ("argo", 9)])
def test_openshift_chooses_the_users_itself(component: str, count: int, tmp_path: Path):
    """Its overlay with one more component: no user or group id is left in any pod."""
    combination((), tmp_path)
    place = tmp_path / "manifests/overlays/openshift/kustomization.yaml"
    place.write_text(
        place.read_text().replace(
            "- ../../components/images", f"- ../../components/{component}\n  - ../../components/images"
        )
    )
    pods = [spec for found in build(place.parent) for _, spec in pod_specs(found)]
    assert len(pods) == count
    for spec in pods:
        assert [problem for problem in not_restricted(spec) if not problem.endswith("image's user")] == []
        assert not [key for key in ("runAsUser", "runAsGroup", "fsGroup") if everywhere(spec, key)]


def test_openshift_ai_knows_the_namespace_and_its_pipeline_server():
    manifests = overlay("openshift")
    labels = named(manifests, "Namespace")["tuneloop"]["metadata"]["labels"]
    assert labels["opendatahub.io/dashboard"] == labels["kueue.openshift.io/managed"] == "true"
    secrets = {right for right in granted(manifests)["tuneloop-step"] if right[1].startswith("secrets")}
    assert secrets == {("", "secrets/ds-pipeline-s3-dspa", "get")}


def test_the_namespace_is_renamed_as_the_readme_says(tmp_path: Path):
    combination((), tmp_path)
    [command] = re.findall(r"^sed .*$", README, re.M)
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    renamed = combination(EVERYTHING, tmp_path)
    assert set(everywhere(renamed, "namespace")) == {"team-a"}
    assert set(named(renamed, "Namespace")) == {"team-a"}


def test_an_image_is_named_in_one_place(tmp_path: Path):
    combination((), tmp_path)
    place = tmp_path / "manifests/components/images/kustomization.yaml"
    text = place.read_text()
    tag = f"newTag: {__version__}"
    text = text.replace(f"tuneloop/train, {tag}", f'tuneloop/train, digest: "sha256:{"0" * 64}"')
    text = text.replace(f"tuneloop/base, {tag}", "tuneloop/base, newName: registry.example/base, newTag: v7")
    place.write_text(text)
    changed = combination(EVERYTHING, tmp_path)
    assert set(everywhere(changed, "image")) == {"registry.example/base:v7", f"tuneloop/train@sha256:{'0' * 64}"}
