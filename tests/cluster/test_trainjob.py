"""The step that trains by a TrainJob: the life of the job."""

import re
import signal
import threading
import time
from typing import Any

import pytest

from components.lora_rl.trainjob.manifest import REQUEST, job_name, train_job
from tests.cluster.trainer_api import trainer_api
from tests.cluster.trainjob_cluster import INPUTS, OUTPUT, SETTINGS, Cluster, cluster, quick
from tests.tiny_run import tiny_config

__all__ = ["cluster", "quick", "trainer_api"]


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
    assert f"lora_rl: TrainJob {name} waits in queue 'tuneloop' (Suspended: waiting for quota)" in said
    assert said[-1] == f"lora_rl: TrainJob {name} is complete"
    nodes = sorted(line for line in output if line.startswith("node "))
    assert nodes == ["node 0 | line 0", "node 0 | lora_rl 1/2 reward 0.5", "node 1 | line 1"]
    assert cluster.left == []


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
