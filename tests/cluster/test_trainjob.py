"""The step that trains by a TrainJob: what it asks of the cluster, and what it lives through."""

import json
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components import api_calls
from components.config import RunConfig
from components.exit_codes import exit_code_of
from components.lora_rl.joint import require_one_base
from components.lora_rl.trainjob import api, launcher, pods
from components.lora_rl.trainjob.launcher import launch
from components.lora_rl.trainjob.manifest import REQUEST, job_name, train_job
from pipelines.placement import QUEUE_LABEL, place
from tests.cluster.faulty_server import Fault
from tests.cluster.kube_api import write_kubeconfig
from tests.cluster.trainer_api import TrainerApi, trainer_api
from tests.tiny_run import tiny_config
from tuneloop.errors import UserError

__all__ = ["trainer_api"]

OUTPUT = "s3://bucket/runs/first/lora_rl"
INPUTS = {"data": "s3://bucket/runs/first/data_prep", "warmup": "s3://bucket/runs/first/sft_warmup"}
SETTINGS = (
    'lora_rl.distributed.launcher="trainjob"', "lora_rl.distributed.trainjob.gpus=4", 'cluster.queue="tuneloop"',
    "lora_rl.distributed.trainjob.patience_seconds=30",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often."""
    monkeypatch.setattr(launcher, "WATCH_SECONDS", 4.0)
    monkeypatch.setattr(launcher, "_GONE_POLL_SECONDS", 0.02)
    monkeypatch.setattr(launcher, "LOG_SECONDS", 2.0)
    monkeypatch.setattr(pods, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(api, "_AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(api_calls, "_FIRST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(api_calls, "LONGEST_WAIT_SECONDS", 0.2)


class Cluster:
    """What happens in the cluster while the step runs: `story`, in a thread."""

    def __init__(self, server: TrainerApi):
        self.server = server
        self.message = ""

    def launch(self, story: Callable[[], Any], *settings: str, config: RunConfig | None = None) -> int:
        """Run the step, and meanwhile the story; returns the step's exit code."""
        found: list[BaseException] = []
        over: list[bool] = []

        def tell() -> None:
            try:
                story()
            except BaseException as error:
                found.append(error)
                if over:
                    return
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

        def note(code: int, message: str) -> None:
            self.message = message

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        config = config or tiny_config(*SETTINGS, *settings)
        code = exit_code_of(lambda: launch(config, INPUTS, OUTPUT, "fingerprint"), note)
        over.append(True)
        thread.join(20)
        if found:
            raise found[0]
        return code

    def run(self) -> list[str]:
        """The nodes start; returns their pods."""
        self.server.admit()
        return [self.server.start_node(node, f"line {node}") for node in range(2)]

    def complete(self, started: list[str]) -> None:
        """The nodes end well."""
        for pod in started:
            self.server.end_node(pod)
        self.server.set_condition("Complete")

    def whole(self) -> None:
        """All of it."""
        self.complete(self.run())

    @property
    def left(self) -> list[Any]:
        """TrainJobs that stay; one that is being removed is waited for."""
        deadline = time.monotonic() + 5
        while self.server.objects and time.monotonic() < deadline:
            if not any("deletionTimestamp" in job["metadata"] for job in self.server.objects.values()):
                break
            time.sleep(0.01)
        return list(self.server.objects.values())


@pytest.fixture
def cluster(trainer_api: TrainerApi) -> Cluster:
    return Cluster(trainer_api)


def test_a_job_is_created_queued_followed_and_removed(cluster: Cluster, capfd: pytest.CaptureFixture[str]):
    def story() -> None:
        cluster.server.set_condition("Suspended", "True", "Suspended", "waiting for quota")
        time.sleep(0.2)
        started = cluster.run()
        cluster.server.write(started[0], "lora_rl 1/2 reward 0.5")
        cluster.complete(started)

    assert cluster.launch(story) == 0
    output = capfd.readouterr().out.splitlines()
    name = job_name(tiny_config(*SETTINGS), OUTPUT)
    said = [line for line in output if line.startswith("lora_rl: ")]
    assert said[0] == f"lora_rl: TrainJob {name} created"
    assert f"lora_rl: TrainJob {name} waits in queue 'tuneloop'" in said
    assert said[-1] == f"lora_rl: TrainJob {name} is complete"
    nodes = sorted(line for line in output if line.startswith("node "))
    assert nodes == ["node 0 | line 0", "node 0 | lora_rl 1/2 reward 0.5", "node 1 | line 1"]
    assert cluster.left == []


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


def test_a_retry_adopts_the_job_that_is_under_way(cluster: Cluster, capfd: pytest.CaptureFixture[str]):
    config = tiny_config(*SETTINGS)
    first = train_job(config, INPUTS, OUTPUT, "fingerprint")
    cluster.server._create("trainjobs", "tuneloop", first)
    started = cluster.run()

    def story() -> None:
        cluster.server.wait_for(lambda: cluster.server.watched_from)
        cluster.complete(started)

    assert cluster.launch(story, config=config) == 0
    assert cluster.server.posted == []
    output = capfd.readouterr().out
    assert "is under way already; following it" in output
    assert "node 0 | line 0" in output  # from the log's beginning
    assert cluster.left == []


@pytest.mark.parametrize("how", ["other settings", "failed", "complete", "being removed"])
def test_what_is_left_of_an_earlier_job_is_replaced(cluster: Cluster, how: str):
    config = tiny_config(*SETTINGS)
    first = train_job(config, INPUTS, OUTPUT, "another" if how == "other settings" else "fingerprint")
    cluster.server._create("trainjobs", "tuneloop", first)
    if how in ("failed", "complete"):
        cluster.server.set_condition(how.capitalize())
    if how == "being removed":
        cluster.server.leaving_seconds = 0.3
        cluster.server._delete(cluster.server.job(), {"propagationPolicy": "Foreground"})

    def story() -> None:
        cluster.server.wait_for(lambda: cluster.server.posted)
        cluster.whole()

    assert cluster.launch(story, config=config) == 0
    [made] = cluster.server.posted
    wanted = train_job(config, INPUTS, OUTPUT, "fingerprint")
    assert made["metadata"]["annotations"][REQUEST] == wanted["metadata"]["annotations"][REQUEST]
    assert cluster.left == []


def test_a_lost_answer_a_conflict_and_throttling_make_one_job(cluster: Cluster):
    cluster.server.faults = [
        Fault("POST", "trainjobs", times=1, done=True),
        Fault("GET", "trainjobs", status=429, times=2, headers={"Retry-After": "0"}),
        Fault("GET", "pods", status=503, times=2),
    ]
    assert cluster.launch(cluster.whole) == 0
    assert len(cluster.server.posted) == 1


def test_another_attempt_is_quicker_to_create_it(cluster: Cluster):
    """Between looking for the job and creating it, somebody else creates it: 409."""
    config = tiny_config(*SETTINGS)
    other = train_job(config, INPUTS, OUTPUT, "fingerprint")
    create = cluster.server._create

    def later(plural: str, namespace: str, body: Any) -> Any:
        if ("trainjobs", other["metadata"]["name"]) not in cluster.server.objects:
            create(plural, namespace, other)
        return create(plural, namespace, body)

    def story() -> None:
        cluster.server.wait_for(lambda: cluster.server.watched_from)
        cluster.whole()

    cluster.server._create = later  # type: ignore[method-assign]
    try:
        assert cluster.launch(story, config=config) == 0
    finally:
        del cluster.server._create
    assert cluster.server.posted == []
    assert cluster.left == []


def test_an_expired_token_is_read_anew(cluster: Cluster, tmp_path: Path):
    cluster.server.token = "first"
    write_kubeconfig(tmp_path / "kubeconfig", cluster.server.url, "first")

    def story() -> None:
        started = cluster.run()
        write_kubeconfig(tmp_path / "kubeconfig", cluster.server.url, "second")
        cluster.server.token = "second"
        time.sleep(0.3)
        cluster.server.write(started[0], "after")
        cluster.complete(started)

    assert cluster.launch(story) == 0
    cluster.server.token = "second"
    assert cluster.left == []


def test_a_token_that_is_refused_is_said(cluster: Cluster):
    cluster.server.token = "other"
    assert cluster.launch(lambda: None) == 2
    assert "does not know you" in cluster.message
    assert "tuneloop-launcher" in cluster.message


def test_watches_that_break_or_are_too_old_miss_nothing(cluster: Cluster):
    cluster.server.cut_watches = 2

    def story() -> None:
        started = cluster.run()
        while cluster.server.cut_watches:
            cluster.server.set_condition("Suspended", "False", "Resumed")
            time.sleep(0.05)
        cluster.server.oldest = int(cluster.server.job()["metadata"]["resourceVersion"]) + 1
        cluster.server.wait_for(lambda: cluster.server.too_old >= 2)
        cluster.complete(started)

    assert cluster.launch(story) == 0
    assert len(cluster.server.watched_from) >= 3
    assert all(int(version) for version in cluster.server.watched_from)


def test_a_server_that_is_away_for_a_while_is_waited_for(cluster: Cluster, capfd: pytest.CaptureFixture[str]):
    def story() -> None:
        started = cluster.run()
        cluster.server.wait_for(lambda: cluster.server.watched_from)
        cluster.server.away_until = time.monotonic() + 3
        time.sleep(3.2)
        cluster.server.write(started[1], "still here")
        cluster.complete(started)

    assert cluster.launch(story) == 0
    captured = capfd.readouterr()
    assert "cannot be reached" in captured.err
    assert captured.out.count("node 1 | still here") == 1
    assert captured.out.count("node 1 | line 1") == 1


def test_a_server_that_stays_away_leaves_the_job_to_the_next_attempt(cluster: Cluster):
    def story() -> None:
        cluster.run()
        cluster.server.wait_for(lambda: cluster.server.watched_from)
        cluster.server.away_until = time.monotonic() + 600

    assert cluster.launch(story, "lora_rl.distributed.trainjob.patience_seconds=1") == 75
    assert "cannot be reached" in cluster.message
    cluster.server.away_until = 0
    assert len(cluster.left) == 1


def test_a_log_that_breaks_is_shown_once(cluster: Cluster, capfd: pytest.CaptureFixture[str]):
    cluster.server.cut_logs = 2

    def story() -> None:
        started = cluster.run()
        for number in range(20):
            cluster.server.write(started[0], f"update {number}")
            time.sleep(0.01)
        cluster.complete(started)

    assert cluster.launch(story) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if "update" in line]
    assert lines == [f"node 0 | update {number}" for number in range(20)]
    assert cluster.server.cut_logs == 0


def test_queued_for_too_long_gives_the_place_in_the_queue_back(cluster: Cluster):
    def story() -> None:
        cluster.server.set_condition("Suspended", "True", "Suspended", "no quota left")

    assert cluster.launch(story, "lora_rl.distributed.trainjob.queue_timeout_seconds=1") == 75
    assert "in queue 'tuneloop' for 1 s (Suspended: no quota left)" in cluster.message
    assert cluster.left == []


def test_waiting_again_has_its_own_time(cluster: Cluster):
    """Running for longer than the limit, and then waiting for nodes that were lost."""

    def story() -> None:
        started = cluster.run()
        time.sleep(0.2)
        cluster.server.set_condition("Suspended", "False", "Resumed", "runs")
        time.sleep(2.2)
        for pod in started:
            cluster.server.lose_node(pod)
        time.sleep(0.2)
        cluster.server.set_condition("Suspended", "False", "Resumed", "waits")
        time.sleep(0.2)
        cluster.complete([cluster.server.start_node(node, attempt=1) for node in range(2)])

    assert cluster.launch(story, "lora_rl.distributed.trainjob.queue_timeout_seconds=2") == 0


def test_a_job_that_took_the_name_is_not_removed(cluster: Cluster):
    first = train_job(tiny_config(*SETTINGS), INPUTS, OUTPUT, "fingerprint")
    cluster.server._create("trainjobs", "tuneloop", first)
    earlier = {"metadata": {**first["metadata"], "uid": "uid-of-an-earlier-one"}}
    api.TrainJobApi("tuneloop", 5).delete(earlier)
    assert cluster.left == [first]


def test_pods_that_do_not_start_are_waited_for_as_long(cluster: Cluster):
    def story() -> None:
        cluster.server.admit()
        pulling = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
        cluster.server.start_node(0, state=pulling)

    assert cluster.launch(story, "lora_rl.distributed.trainjob.queue_timeout_seconds=2") == 75
    assert "for its pods to start for 2 s (ImagePullBackOff: no such image)" in cluster.message
    assert cluster.left == []


def test_sigterm_removes_the_job_and_shows_how_it_stops(cluster: Cluster, capfd: pytest.CaptureFixture[str]):
    cluster.server.leaving_seconds = 0.5

    def story() -> None:
        started = cluster.run()
        cluster.server.wait_for(lambda: cluster.server.watched_from)
        time.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        cluster.server.wait_for(lambda: "deletionTimestamp" in cluster.server.job()["metadata"])
        cluster.server.write(started[0], "stopped after update 7, which is saved")

    assert cluster.launch(story) == 75
    assert "stopped by SIGTERM" in cluster.message
    assert "node 0 | stopped after update 7, which is saved" in capfd.readouterr().out
    assert cluster.server.objects == {}


def test_a_users_mistake_ends_it_before_the_nodes_are_started_again(cluster: Cluster):
    def story() -> None:
        started = cluster.run()
        cluster.server.end_node(started[0], 2, "task.rewards: no such function\n")

    assert cluster.launch(story) == 2
    assert cluster.message == "task.rewards: no such function"
    assert cluster.left == []


@pytest.mark.parametrize(
    ("endings", "code", "said"),
    [
        (((137, "", "OOMKilled"), (1, "connection lost", "")), 1, "node 0 of TrainJob .* exit code 137: OOMKilled"),
        (((75, "stopped", ""), (143, "", "")), 75, r"failed \(Because: no more restarts\)"),
        (((1, "ValueError: x", ""), (75, "", "")), 1, "node 0 of TrainJob .* exit code 1: ValueError: x"),
    ],
)
def test_a_failed_job_is_a_bug_or_bad_luck(cluster: Cluster, endings: Any, code: int, said: str):
    def story() -> None:
        started = cluster.run()
        for pod, (exit_code, message, reason) in zip(started, endings, strict=True):
            cluster.server.end_node(pod, exit_code, message, reason)
        cluster.server.set_condition("Failed", message="no more restarts")

    assert cluster.launch(story) == code
    assert re.search(said, cluster.message), cluster.message
    assert cluster.left == []


def test_nodes_that_are_lost_come_again_and_are_followed(cluster: Cluster, capfd: pytest.CaptureFixture[str]):
    def story() -> None:
        for pod in cluster.run():
            time.sleep(0.2)
            cluster.server.lose_node(pod)
        cluster.complete([cluster.server.start_node(node, f"again {node}", attempt=1) for node in range(2)])

    assert cluster.launch(story) == 0
    output = capfd.readouterr().out
    assert [output.count(f"node {node} | again {node}") for node in range(2)] == [1, 1]


def test_a_job_that_somebody_removes_is_tried_again(cluster: Cluster):
    def story() -> None:
        cluster.run()
        cluster.server.wait_for(lambda: cluster.server.watched_from)
        cluster.server._delete(cluster.server.job(), {"propagationPolicy": "Foreground"})

    assert cluster.launch(story) == 75
    assert "removed by somebody else" in cluster.message


def test_what_is_on_a_local_disk_and_a_missing_cluster_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    messages: list[str] = []
    config = tiny_config(*SETTINGS)
    refused = exit_code_of(lambda: launch(config, INPUTS, "runs/x", "f"), lambda _, text: messages.append(text))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    missing = exit_code_of(lambda: launch(config, INPUTS, OUTPUT, "f"), lambda _, text: messages.append(text))
    assert (refused, missing) == (2, 2)
    assert "--output runs/x" in messages[0]
    assert "needs a Kubernetes cluster" in messages[1]


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
