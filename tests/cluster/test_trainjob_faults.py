"""The step that trains by a TrainJob: an API server that is throttling, broken, away or forgetful."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from components.lora_rl.trainjob import api, launcher
from components.lora_rl.trainjob.manifest import train_job
from tests.cluster.faulty_server import Fault
from tests.cluster.kube_api import write_kubeconfig
from tests.cluster.trainer_api import trainer_api
from tests.cluster.trainjob_cluster import INPUTS, OUTPUT, SETTINGS, Cluster, cluster, quick
from tests.tiny_run import tiny_config

__all__ = ["cluster", "quick", "trainer_api"]


def test_a_lost_answer_a_conflict_and_throttling_make_one_job(cluster: Cluster):
    cluster.server.faults = [
        Fault("POST", "trainjobs", times=1, done=True),
        Fault("GET", "trainjobs", status=429, times=2, headers={"Retry-After": "0"}),
        Fault("GET", "pods", status=503, times=2),
    ]
    assert cluster.launch(cluster.whole) == 0
    assert len(cluster.server.posted) == 1


def test_a_job_that_comes_to_be_after_the_step_was_stopped_is_removed(cluster: Cluster):
    """SIGTERM while the request to create it is on its way."""
    cluster.server.faults = [Fault("POST", "trainjobs", seconds=1.0)]

    def story() -> None:
        cluster.server.wait_for(lambda: "POST" in {method for method, _ in cluster.server.requests})
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    assert cluster.launch(story) == 75
    cluster.server.wait_for(lambda: cluster.server.posted)
    assert cluster.left == []


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


def test_a_server_that_is_away_for_a_while_is_waited_for(
    cluster: Cluster, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launcher, "LOG_SECONDS", 15.0)  # at most; a busy machine may need them

    def asked() -> int:
        return sum("/trainjobs" in path for _, path in cluster.server.requests)

    def story() -> None:
        started = cluster.run()
        cluster.server.wait_for(lambda: cluster.server.watched_from)
        before = asked()
        cluster.server.away_until = time.monotonic() + 600
        cluster.server.wait_for(lambda: asked() >= before + 6)
        cluster.server.away_until = 0
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


def test_a_job_that_took_the_name_is_not_removed(cluster: Cluster):
    first = train_job(tiny_config(*SETTINGS), INPUTS, OUTPUT, "fingerprint")
    cluster.server._create("trainjobs", "tuneloop", first)
    earlier = {"metadata": {**first["metadata"], "uid": "uid-of-an-earlier-one"}}
    api.TrainJobApi("tuneloop", 5).delete(earlier)
    assert cluster.left == [first]
