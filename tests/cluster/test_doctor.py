"""`doctor` before the first run: every line that can fail, and what it says to do."""

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

from pipelines.cluster.doctor_places import look_at_image, split_image
from pipelines.cluster.not_checked import NotChecked
from tests.cluster.command import ON_A_CLUSTER, RUNS, Answer, Command
from tests.cluster.faulty_server import Fault
from tests.cluster.kube_api import KubeApi
from tests.cluster.rendering import named, overlay
from tests.s3_server import s3_server  # noqa: F401 - a fixture
from tuneloop.errors import UserError

QUOTAS = "/api/v1/namespaces/tuneloop/resourcequotas"
LIMIT_RANGES = "/api/v1/namespaces/tuneloop/limitranges"
CLUSTER_QUEUE = "/apis/kueue.x-k8s.io/v1beta2/clusterqueues/tuneloop"
SEVERAL_NODES = ('lora_rl.distributed.launcher="trainjob"', "cluster.steps.lora_rl.gpus=0")
GROUPS = {"argoproj.io": "v1alpha1", "kueue.x-k8s.io": "v1beta2", "trainer.kubeflow.org": "v1alpha1"}


class Registry:
    """A double of an image registry: HEAD of manifests behind an anonymous token, as the OCI specification has it."""

    def __init__(self) -> None:
        self.images = {"tuneloop/base:1", "tuneloop/train:1"}
        self.private = False
        self._server = make_server("127.0.0.1", 0, self._handle, threaded=True)
        self.host = f"127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()

    def _handle(self, environ, start_response):
        return self._answer(Request(environ))(environ, start_response)

    def _answer(self, request: Request) -> Response:
        if request.path == "/token":
            return Response('{"token": "anybody"}', status=403 if self.private else 200)
        if request.headers.get("Authorization") != "Bearer anybody":
            realm = f'Bearer realm="http://{self.host}/token",service="here",scope="repository:x:pull"'
            return Response(status=401, headers={"WWW-Authenticate": realm})
        name = request.path.removeprefix("/v2/").replace("/manifests/", ":")
        return Response(status=200 if name in self.images else 404, headers={"Docker-Content-Digest": "sha256:abc"})


@pytest.fixture
def registry() -> Iterator[Registry]:
    found = Registry()
    yield found
    found.close()


def manifest(kind: str) -> dict[str, Any]:
    """The object of a kind that the manifests have for production."""
    return copy.deepcopy(named(overlay("prod"), kind)["tuneloop"])


@pytest.fixture
def cluster(kube_api: KubeApi, s3_server) -> KubeApi:  # noqa: F811
    """A cluster that has everything."""
    groups = [{"name": name, "versions": [{"groupVersion": f"{name}/{version}", "version": version}]}
              for name, version in GROUPS.items()]  # fmt: skip
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    node = {"metadata": {"name": "n1", "labels": {"gpu": "h100"}}, "spec": {},
            "status": {"allocatable": {"cpu": "64", "nvidia.com/gpu": "8"}}}  # fmt: skip
    kube_api.things = {
        "/version/": {"major": "1", "minor": "34+", "gitVersion": "v1.34.1", "gitCommit": "", "gitTreeState": "",
                     "buildDate": "", "goVersion": "", "compiler": "", "platform": ""},
        "/apis/": {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups},
        "/api/v1/namespaces/tuneloop": {"metadata": {"name": "tuneloop", "labels": labels}},
        "/api/v1/namespaces/tuneloop/serviceaccounts/tuneloop-step": {"metadata": {"name": "tuneloop-step"}},
        "/api/v1/namespaces/tuneloop/secrets/store": {"metadata": {"name": "store"}, "data": {"KEY_ID": "eA=="}},
        "/apis/kueue.x-k8s.io/v1beta2/workloadpriorityclasses/soon": {"metadata": {"name": "soon"}, "value": 1},
        "/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/tuneloop": {"metadata": {"name": "tuneloop"}},
        QUOTAS: {"kind": "ResourceQuotaList", "apiVersion": "v1", "metadata": {}, "items": [manifest("ResourceQuota")]},
        LIMIT_RANGES: {"kind": "LimitRangeList", "apiVersion": "v1", "metadata": {}, "items": [manifest("LimitRange")]},
        CLUSTER_QUEUE: manifest("ClusterQueue"),
        "/api/v1/nodes": {"kind": "NodeList", "apiVersion": "v1", "metadata": {}, "items": [node]},
    }  # fmt: skip
    queue = {"metadata": {"name": "gpus"}, "spec": {"clusterQueue": "tuneloop"},
             "status": {"conditions": [{"type": "Active", "status": "True"}]}}  # fmt: skip
    kube_api.objects["localqueues", "gpus"] = queue
    return kube_api


@pytest.fixture
def doctor(command: Command, registry: Registry):
    def call(*more: str, options: tuple[str, ...] = ("--target", "argo")) -> Answer:
        images = [f"cluster.{kind}_image={registry.host}/tuneloop/{kind}:1" for kind in ("base", "train")]
        sets = [*images, "cluster.queue=gpus", "cluster.steps.lora_rl.gpus=8",
                'cluster.secrets=[{secret="store", key="KEY_ID", env="AWS_ACCESS_KEY_ID"}]', *more]  # fmt: skip
        given = [part for one in sets for part in ("--set", one)]
        return command("doctor", "--config", str(command.toml), *ON_A_CLUSTER, *given, "--output", RUNS,
                       *options, "--patience", "0")  # fmt: skip

    return call


def test_cluster_that_has_everything(doctor, cluster):
    answer = doctor()
    assert (answer.code, answer.err) == (0, "")
    assert {line.split()[0] for line in answer.out.splitlines()} == {"ok"}
    for part in ("object store", "v1.34.1", "profile restricted", "argoproj.io/v1alpha1", "argoproj.io: granted",
                 "8 on 1 nodes", "of the cluster queue tuneloop", "sha256:abc", "has KEY_ID"):  # fmt: skip
        assert part in answer.out, part


def test_a_server_that_does_not_know_its_numbers_is_believed(doctor, cluster):
    cluster.things["/version/"].update(major="", minor="")
    assert doctor().code == 0


def test_nothing_is_left_in_the_store(doctor, cluster, s3_server):  # noqa: F811
    doctor()
    assert s3_server.client().list_objects_v2(Bucket="models").get("KeyCount") == 0


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda api: api.things.pop("/api/v1/namespaces/tuneloop"), "namespace tuneloop: is not there: apply"),
        (lambda api: api.things["/apis/"]["groups"].pop(0), "the cluster has no argoproj.io: install Argo Workflows 4"),
        (lambda api: api.things["/apis/"]["groups"][1]["versions"][0].update(version="v1beta1"), "and not v1beta2"),
        (lambda api: api.denied.add(("create", "workflows")), "permission create workflows.argoproj.io: you may not"),
        (lambda api: api.things.pop("/api/v1/namespaces/tuneloop/serviceaccounts/tuneloop-step"), "service_account"),
        (lambda api: api.things.pop("/api/v1/namespaces/tuneloop/secrets/store"), "secret store: is not there"),
        (lambda api: api.things["/api/v1/namespaces/tuneloop/secrets/store"].update(data={}), "has no key KEY_ID"),
        (lambda api: api.things["/api/v1/nodes"]["items"][0]["status"]["allocatable"].update({"nvidia.com/gpu": "4"}),
         "the largest of 1 nodes has 4 of nvidia.com/gpu: ask for fewer GPUs"),
        (lambda api: api.objects.pop(("localqueues", "gpus")), "queue gpus: is not there: apply"),
        (lambda api: api.objects["localqueues", "gpus"]["status"]["conditions"][0].update(status="False", message="no"),
         "takes no work: no"),
        (lambda api: api.things["/version/"].update(minor="28"), "1.33 or newer is needed"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_what_to_do(doctor, cluster, broken, said):
    broken(cluster)
    answer = doctor()
    assert answer.code == 2
    [line] = [line for line in answer.out.splitlines() if line.startswith("FAILED")]
    assert said in line
    assert "1 of" in answer.err


def test_kubeflow_of_one_user_runs_pods_in_its_own_namespace(doctor, cluster, kfp_server):
    on_kfp = ("--target", "kfp", "--host", kfp_server.url)
    answer = doctor(options=on_kfp)
    [line] = [line for line in answer.out.splitlines() if line.startswith("FAILED")]
    assert "has a single user, so pods run in its own namespace" in line
    assert 'set [cluster] namespace = "kubeflow"' in line
    kfp_server.multi_user = True
    answer = doctor(options=on_kfp)
    assert answer.code == 0, answer.out
    assert "for several users, namespace tuneloop" in answer.out


def test_resource_of_another_name_is_told(doctor, cluster):
    cluster.things["/api/v1/nodes"]["items"][0]["status"]["allocatable"] = {"amd.com/gpu": "8"}
    assert "extended resources there: amd.com/gpu" in doctor().out


def test_node_that_no_selector_finds(doctor, cluster):
    assert "no node has the labels gpu=a100" in doctor('cluster.gpu_node_selector={gpu="a100"}').out


def taint(cluster: KubeApi, **more: str) -> None:
    cluster.things["/api/v1/nodes"]["items"][0]["spec"] = {"taints": [{"effect": "NoSchedule", **more}]}


def test_node_that_repels_the_pods(doctor, cluster):
    taint(cluster, key="pool", value="training")
    answer = doctor()
    assert answer.code == 2
    assert "node n1 has the taint pool=training:NoSchedule: tolerate it in [cluster] gpu_tolerations" in answer.out
    assert doctor('cluster.tolerations=[{key="pool", value="serving"}]').code == 2
    assert doctor('cluster.tolerations=[{key="pool", value="training"}]').code == 0
    assert doctor('cluster.tolerations=[{operator="Exists"}]').code == 0


def test_taint_of_the_gpus_may_be_tolerated_by_the_cluster_itself(doctor, cluster):
    taint(cluster, key="nvidia.com/gpu", value="present")
    assert doctor().code == 0  # as [cluster] has it by default
    answer = doctor("cluster.gpu_tolerations=[]")
    assert (answer.code, "ExtendedResourceToleration" in answer.out) == (0, True)
    assert [line for line in answer.out.splitlines() if line.startswith("unknown")]


def test_priority_that_kueue_does_not_know(doctor, cluster):
    assert doctor("cluster.queue_priority=soon").code == 0
    assert (
        "priority later: is not there: apply manifests/components/kueue" in doctor("cluster.queue_priority=later").out
    )


def test_run_on_several_nodes_needs_a_runtime_and_its_nodes_gpus(doctor, cluster):
    assert "training runtime tuneloop: is there" in doctor(*SEVERAL_NODES).out
    answer = doctor(*SEVERAL_NODES, "lora_rl.distributed.trainjob.gpus=16")
    assert "16 x nvidia.com/gpu on one node: the largest of 1 nodes has 8" in answer.out
    del cluster.things["/apis/trainer.kubeflow.org/v1alpha1/clustertrainingruntimes/tuneloop"]
    assert "training runtime tuneloop: is not there: apply manifests/components/trainer" in doctor(*SEVERAL_NODES).out


def test_what_a_run_asks_for_is_compared_with_the_quotas(doctor, cluster):
    answer = doctor(*SEVERAL_NODES)  # two nodes with eight GPUs each, as the defaults have it
    assert answer.code == 0, answer.out
    assert "16 nvidia.com/gpu at once at the most, within cluster queue tuneloop" in answer.out
    answer = doctor(*SEVERAL_NODES, "lora_rl.distributed.trainjob.nodes=4")
    failed = [line for line in answer.out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 2
    assert "lora_rl on 4 nodes asks for 32 of 18 nvidia.com/gpu in resource quota tuneloop: ask for less" in failed[0]
    assert (
        "lora_rl on 4 nodes asks for 32 of 16 nvidia.com/gpu in cluster queue tuneloop, which would never" in failed[1]
    )
    answer = doctor("cluster.steps.evaluate.memory=2Ti", "cluster.steps.data_prep.cpu=96500m")
    assert "data_prep asks for 96.6 of 96 cpu in resource quota tuneloop" in answer.out
    assert doctor("cluster.queue=", "cluster.steps.lora_rl.gpus=0", "cluster.steps.evaluate.memory=2Ti").code == 2


def test_what_runs_beside_a_step_is_counted(doctor, cluster):
    """The defaults on the quota of `overlays/dev`, into which the nodes alone would fit."""
    hard = cluster.things[QUOTAS]["items"][0]["spec"]["hard"]
    hard |= {"requests.cpu": "16", "requests.memory": "128Gi", "requests.nvidia.com/gpu": "2"}
    answer = doctor(*SEVERAL_NODES, "lora_rl.distributed.trainjob.gpus=1")
    assert "lora_rl on 2 nodes asks for 16.6 of 16 cpu, 129.125Gi of 128Gi memory in resource quota" in answer.out
    resources = cluster.things[CLUSTER_QUEUE]["spec"]["resourceGroups"][0]["flavors"][0]["resources"]
    resources[1]["nominalQuota"] = "64Gi"
    assert "lora_rl asks for 64.125Gi of 64Gi memory in cluster queue tuneloop" in doctor().out
    cluster.things[LIMIT_RANGES]["items"].clear()
    assert queue_states(doctor())[0].startswith("ok")


def test_what_the_namespace_adds_has_to_be_covered_by_the_queue(doctor, cluster):
    [group] = cluster.things[CLUSTER_QUEUE]["spec"]["resourceGroups"]
    group["coveredResources"].remove("ephemeral-storage")
    assert "covers no ephemeral-storage" in queue_states(doctor())[0]
    group["flavors"][0]["resources"][-1]["nominalQuota"] = "4"  # what is certain goes before what is not
    assert "asks for 8 of 4 nvidia.com/gpu" in queue_states(doctor())[0]


def test_quotas_of_limits(doctor, cluster):
    hard = cluster.things[QUOTAS]["items"][0]["spec"]["hard"]
    hard["limits.memory"] = "8Gi"
    assert "data_prep asks for 8.125Gi of 8Gi memory in resource quota tuneloop" in doctor().out
    del hard["limits.memory"]
    hard["limits.cpu"] = "64"
    assert "resource quota tuneloop counts limits.cpu, and steps have no limit of CPUs" in doctor().out
    cluster.things[LIMIT_RANGES]["items"][0]["spec"]["limits"][0]["default"] = {"cpu": "64"}
    assert doctor().code == 0


def test_quota_of_some_pods_alone_is_passed_over(doctor, cluster):
    spec = cluster.things[QUOTAS]["items"][0]["spec"]
    spec["hard"] = {"requests.nvidia.com/gpu": "1"}
    assert "lora_rl asks for 8 of 1 nvidia.com/gpu" in doctor().out
    spec["scopes"] = ["BestEffort"]
    assert doctor().code == 0


def queue_states(answer: Answer) -> list[str]:
    return [line for line in answer.out.splitlines() if " cluster queue tuneloop: " in line]


def test_what_a_cohort_may_lend_is_no_failure(doctor, cluster):
    spec = cluster.things[CLUSTER_QUEUE]["spec"]
    gpus = spec["resourceGroups"][0]["flavors"][0]["resources"][-1]
    gpus["nominalQuota"] = 4  # as servers may also write a quantity
    [line] = queue_states(doctor())
    assert line.startswith("FAILED")
    spec["cohortName"] = "all"
    [line] = queue_states(doctor())
    assert line.startswith("unknown")
    assert "lora_rl asks for 8 of 4 nvidia.com/gpu in cluster queue tuneloop: it waits until cohort all lends" in line
    gpus["borrowingLimit"] = "3"
    [line] = queue_states(doctor())
    assert line.startswith("FAILED")


def test_a_run_that_fits_into_one_of_two_flavors(doctor, cluster):
    [group] = cluster.things[CLUSTER_QUEUE]["spec"]["resourceGroups"]
    small = copy.deepcopy(group["flavors"][0])
    small["resources"][-1]["nominalQuota"] = "4"
    group["flavors"].insert(0, small)
    assert doctor().code == 0
    group["flavors"].pop()
    assert doctor().code == 2


def test_resource_that_the_cluster_queue_does_not_cover(doctor, cluster):
    [group] = cluster.things[CLUSTER_QUEUE]["spec"]["resourceGroups"]
    group["coveredResources"] = ["cpu", "nvidia.com/gpu"]
    group["flavors"][0]["resources"] = [
        one for one in group["flavors"][0]["resources"] if one["name"] in group["coveredResources"]
    ]
    [line] = queue_states(doctor())
    assert line.startswith("unknown")
    assert "lora_rl is never admitted: cluster queue tuneloop covers no ephemeral-storage, memory" in line


def test_what_one_may_not_look_at_is_no_failure(doctor, cluster):
    paths = "/secrets/", "/nodes", "/resourcequotas", "/clusterqueues/"
    cluster.faults.append(Fault(path="/limitranges", status=403))  # without them, what is asked for by name is compared
    cluster.faults += [Fault(path=path, status=403) for path in paths]
    answer = doctor()
    assert answer.code == 0
    unknown = [line for line in answer.out.splitlines() if line.startswith("unknown")]
    assert len(unknown) == len(paths)
    assert "you may not list nodes, which a run does not need" in answer.out


def test_cluster_that_is_away_leaves_the_other_lines(doctor, cluster):
    cluster.faults.append(Fault(times=1000))
    answer = doctor()
    assert answer.code == 2
    assert "ok       object store" in answer.out
    assert "FAILED   Kubernetes" in answer.out
    assert "cannot be reached" in answer.out


def test_store_that_ignores_conditions_is_refused(doctor, cluster, s3_server):  # noqa: F811
    s3_server.ignore_conditions = {"IF_MATCH", "IF_NONE_MATCH"}
    assert "ignores If-None-Match on PUT" in doctor().out
    s3_server.ignore_conditions = {"IF_MATCH"}
    assert "ignores If-Match on PUT" in doctor().out


def test_bucket_that_is_not_there(command, cluster, registry):
    answer = command("doctor", "--config", str(command.toml), "--output", "s3://nowhere/runs", "--target", "argo",
                     "--set", "promote.registry=s3://models/registry")  # fmt: skip
    assert "FAILED   object store: s3://nowhere/runs" in answer.out


# Images


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("ghcr.io/a/b:1", ("ghcr.io", "a/b", "1")),
        ("localhost:5000/b:1", ("localhost:5000", "b", "1")),
        ("tuneloop/base:1", ("registry-1.docker.io", "tuneloop/base", "1")),
        ("python:3.11", ("registry-1.docker.io", "library/python", "3.11")),
        ("ghcr.io/a/b@sha256:00", ("ghcr.io", "a/b", "sha256:00")),
    ],
)
def test_reference_is_read_as_runtimes_do(image, parts):
    assert split_image(image) == parts


def test_image_that_is_not_there(registry):
    with pytest.raises(UserError, match="has no such image: push it"):
        look_at_image(f"{registry.host}/tuneloop/none:1", ())


def test_image_that_wants_credentials(registry):
    registry.private = True
    with pytest.raises(NotChecked, match="which the cluster has in pull"):
        look_at_image(f"{registry.host}/tuneloop/base:1", ("pull",))


def test_registry_that_is_away():
    with pytest.raises(NotChecked, match="cannot be reached from here"):
        look_at_image("127.0.0.1:9/tuneloop/base:1", ())
