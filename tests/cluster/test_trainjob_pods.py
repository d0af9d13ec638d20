"""The step that trains by a TrainJob: what its pods say, and what the cluster refuses."""

import re
import threading
import time
from typing import Any

import pytest

from components.api_calls import Refused
from components.lora_rl.trainjob import api
from components.lora_rl.trainjob.manifest import train_job
from components.lora_rl.trainjob.pods import Pods
from tests.cluster.faulty_server import Fault
from tests.cluster.trainer_api import trainer_api
from tests.cluster.trainjob_cluster import INPUTS, OUTPUT, SETTINGS, Cluster, cluster, quick
from tests.tiny_run import tiny_config

__all__ = ["cluster", "quick", "trainer_api"]


def test_why_pods_do_not_start_is_said_at_once(cluster: Cluster, capfd: pytest.CaptureFixture[str]):
    """In other words each time, and by turns with the try itself; a node that has no room is another reason."""

    def waiting(reason: str, message: str) -> None:
        cluster.server._set_state(pod[0], {"waiting": {"reason": reason, "message": message}})
        time.sleep(0.2)
        cluster.server.set_condition("Suspended", "False", "Resumed", message)
        time.sleep(0.2)

    pod: list[str] = []

    def story() -> None:
        cluster.server.admit()
        pod.append(cluster.server.start_node(0, state={"waiting": {"reason": "ContainerCreating"}}))
        waiting("ErrImagePull", "no such\nimage")
        for number in range(3):
            waiting("ImagePullBackOff", f"back-off {number}")
            waiting("ErrImagePull", f"try {number}")
        cluster.complete([pod[0], cluster.server.start_node(1)])

    assert cluster.launch(story) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if "waits for its pods to start (" in line]
    assert [line.partition("(")[2] for line in said] == [
        "ErrImagePull: no such image)",
        "ImagePullBackOff: back-off 0)",
    ]


def test_a_job_that_is_preempted_is_said_to_wait_each_time(cluster: Cluster, capfd: pytest.CaptureFixture[str]):
    """Kueue suspends a job that runs: its wait is counted from then, and so is the next one."""

    def run(attempt: int) -> list[str]:
        cluster.server.admit()
        started = [cluster.server.start_node(node, attempt=attempt) for node in range(2)]
        time.sleep(0.3)
        cluster.server.set_condition("Suspended", "False", "Resumed", "runs")
        time.sleep(0.3)
        return started

    def story() -> None:
        for attempt in range(2):
            for pod in run(attempt):
                cluster.server.lose_node(pod)
            cluster.server.job()["spec"]["suspend"] = True
            cluster.server.set_condition("Suspended", "True", "Suspended", "preempted")
            time.sleep(1.2)
        cluster.complete(run(2))

    assert cluster.launch(story, "lora_rl.distributed.trainjob.queue_timeout_seconds=2") == 0
    output = capfd.readouterr().out
    assert output.count("waits in queue 'tuneloop' (Suspended: preempted)") == 2
    assert output.count("runs on 2 nodes") == 3


def test_a_pod_that_two_threads_see_first_is_followed_once(cluster: Cluster):
    """The one that looks every few seconds, and the one that is told that the job has failed."""
    cluster.server._create("trainjobs", "tuneloop", train_job(tiny_config(*SETTINGS), INPUTS, OUTPUT, "fingerprint"))
    client = api.TrainJobApi("tuneloop", 5)
    name = cluster.server.job()["metadata"]["name"]
    for node in range(2):
        cluster.server.start_node(node)
    followed: list[str] = []
    pods = Pods(client, name, 2)

    class Slow(dict[str, threading.Thread]):
        def __contains__(self, key: object) -> bool:
            found = super().__contains__(key)
            time.sleep(0.05)  # another thread's turn
            return found

        def __setitem__(self, key: str, thread: threading.Thread) -> None:
            followed.append(key)
            super().__setitem__(key, thread)

    pods._logs = Slow()
    lookers = [threading.Thread(target=pods.look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    for looker in lookers:
        looker.join()
    with pods:
        pass
    assert len(followed) == 2


def test_pods_that_may_not_be_seen_are_said_before_anything_waits(cluster: Cluster):
    """Else the job seems never to start, and is removed while it trains."""
    cluster.server.faults = [Fault("GET", "/pods", status=403, times=1000)]
    assert cluster.launch(lambda: None) == 2
    assert "you may not do this" in cluster.message
    assert cluster.left == []


def test_a_log_that_cannot_be_read_is_said_once(cluster: Cluster, capfd: pytest.CaptureFixture[str]):
    cluster.server.faults = [Fault("GET", "/log", status=500, times=1000)]

    def story() -> None:
        started = cluster.run()
        time.sleep(2.5)
        cluster.complete(started)

    assert cluster.launch(story) == 0
    assert capfd.readouterr().err.count("cannot be seen") == 1


def taken_away(cluster: Cluster, pod: str) -> None:
    cluster.server.pods[pod]["status"]["conditions"] = [
        {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager",
         "message": "Taint manager: deleting due to NoExecute taint", "lastTransitionTime": cluster.server._now()}
    ]  # fmt: skip


@pytest.mark.parametrize("says_how_it_ended", [True, False])
def test_a_node_that_is_lost_for_good_is_bad_luck_and_no_bug(cluster: Cluster, says_how_it_ended: bool):
    """The other node's lost connection looks like a bug, and so does a kill."""

    def story() -> None:
        started = cluster.run()
        taken_away(cluster, started[0])
        if says_how_it_ended:
            cluster.server.end_node(started[0], 137, reason="Error")
        cluster.server.end_node(started[1], 1, "RuntimeError: connection closed by peer")
        cluster.server.set_condition("Failed", message="no more restarts")

    assert cluster.launch(story) == 75
    assert re.search(r"node 0 of TrainJob .* was lost \(DeletionByTaintManager: Taint manager", cluster.message)
    assert cluster.left == []


def test_somebody_elses_job_of_this_name_is_left_alone(cluster: Cluster):
    other = train_job(tiny_config(*SETTINGS), INPUTS, OUTPUT, "fingerprint")
    del other["metadata"]["annotations"]
    cluster.server._create("trainjobs", "tuneloop", other)
    assert cluster.launch(lambda: None) == 2
    assert "was not made by tuneloop" in cluster.message
    assert cluster.left == [other]
    assert "DELETE" not in {method for method, _ in cluster.server.requests}


@pytest.mark.parametrize("said", [
    'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: spec.runtimeRef: Invalid value',
    "pods is forbidden: exceeded quota: tuneloop, requested: requests.nvidia.com/gpu=16",
])  # fmt: skip
def test_a_refusal_that_is_no_question_of_rights_is_not_called_one(cluster: Cluster, said: str):
    def refuse(plural: str, namespace: str, body: Any) -> Any:
        return cluster.server.error(403, said)

    cluster.server._create = refuse  # type: ignore[method-assign]
    try:
        with pytest.raises(Refused, match="refused \\(403: ") as refused:
            api.TrainJobApi("tuneloop", 5).ensure(train_job(tiny_config(*SETTINGS), INPUTS, OUTPUT, "fingerprint"))
    finally:
        del cluster.server._create
    assert said[:60] in str(refused.value)
    assert "role" not in str(refused.value)
