"""The step that trains by a TrainJob: what it asks of the cluster, and what it refuses."""

import json
from pathlib import Path

import pytest

from components.cluster_config import QUEUE_LABEL
from components.exit_codes import exit_code_of
from components.lora_rl.joint import require_one_base
from components.lora_rl.trainjob.launcher import launch
from pipelines.placement import place
from tests.cluster.trainer_api import trainer_api
from tests.cluster.trainjob_cluster import INPUTS, OUTPUT, SETTINGS, Cluster, cluster, quick
from tests.tiny_run import tiny_config
from tuneloop.errors import UserError

__all__ = ["cluster", "quick", "trainer_api"]


def test_the_job_says_what_to_run_and_where(cluster: Cluster):
    settings = (
        'cluster.train_image="registry/train:1.2"', 'cluster.env={AWS_ENDPOINT_URL="http://minio:9000"}',
        'cluster.secrets=[{secret="s3", key="AWS_SECRET_ACCESS_KEY"}, {secret="hub", key="T", steps=["check"]}]',
        'cluster.gpu_node_selector={pool="a100"}', 'cluster.image_pull_secrets=["pull"]',
        'task.system_prompt="$(HOME)$$"', 'cluster.queue_priority="high"', 'name="0_very.long-name-that-goes-on"',
    )  # fmt: skip
    assert cluster.launch(cluster.whole, *settings) == 0
    [job] = cluster.server.posted
    metadata, trainer = job["metadata"], job["spec"]["trainer"]
    assert metadata["name"].startswith("tuneloop-0-very-long-name-tha-")
    assert len(metadata["name"]) <= 40
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == "tuneloop"
    assert metadata["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    assert "ownerReferences" not in metadata
    assert job["spec"]["suspend"] is True
    assert job["spec"]["runtimeRef"]["name"] == "tuneloop"
    assert (trainer["image"], trainer["numNodes"], trainer["numProcPerNode"]) == ("registry/train:1.2", 2, 4)
    assert trainer["resourcesPerNode"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": "4"}
    assert trainer["env"] == [
        {"name": "AWS_ENDPOINT_URL", "value": "http://minio:9000"},
        {
            "name": "AWS_SECRET_ACCESS_KEY",
            "valueFrom": {"secretKeyRef": {"name": "s3", "key": "AWS_SECRET_ACCESS_KEY", "optional": False}},
        },
    ]
    [argument] = trainer["args"]
    assert "$" not in argument  # which Kubernetes would replace
    request = json.loads(argument)
    assert request["config"]["task"]["system_prompt"] == "$(HOME)$$"
    assert (request["inputs"], request["output"]) == (INPUTS, OUTPUT)
    [patch] = job["spec"]["runtimePatches"]
    [replicated] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "a100"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


def test_what_is_on_a_local_disk_and_a_missing_cluster_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    messages: list[str] = []
    config = tiny_config(*SETTINGS)
    refused = exit_code_of(lambda: launch(config, INPUTS, "runs/x", "f"), lambda _, text: messages.append(text))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    missing = exit_code_of(lambda: launch(config, INPUTS, OUTPUT, "f"), lambda _, text: messages.append(text))
    (tmp_path / "none").write_text("hello")
    damaged = exit_code_of(lambda: launch(config, INPUTS, OUTPUT, "f"), lambda _, text: messages.append(text))
    assert (refused, missing, damaged) == (2, 2, 2)
    assert "--output runs/x" in messages[0]
    assert all("needs a Kubernetes cluster" in message for message in messages[1:])


def test_the_step_that_launches_has_no_gpu_and_is_not_queued_itself():
    planned = ('check.gpu="a100-80gb"', "check.gpus=8")
    launching = place(tiny_config(*SETTINGS, *planned), "lora_rl", "image:1")
    assert (launching.gpus, launching.shm, launching.memory) == (0, "", "1Gi")
    assert QUEUE_LABEL not in launching.labels
    training = place(tiny_config(*planned), "lora_rl", "image:1")
    assert (training.gpus, training.memory) == (8, "64Gi")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("lora_rl.distributed.processes=2",), "trainjob.gpus = 4, one for each process"),
        (('lora_rl.rank_schedule.kind="spectrum"',), "in one process only"),
        (('lora_rl.engine.kind="vllm"', "lora_rl.engine.tensor_parallel_size=3"), "does not divide the 4 processes"),
        (('check.gpu="a100-80gb"', "check.gpus=4"), "the TrainJob has 8"),
        (("lora_rl.distributed.trainjob.nodes=0",), "nodes"),
    ],
)
def test_what_nodes_cannot_do_is_refused_before_anything_runs(settings: tuple[str, ...], said: str):
    with pytest.raises(UserError, match=said):
        tiny_config(*SETTINGS, *settings)


def test_runs_that_share_a_process_launch_nothing():
    with pytest.raises(UserError, match="several processes"):
        require_one_base([tiny_config(*SETTINGS)])
