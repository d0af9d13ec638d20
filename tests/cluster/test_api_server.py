"""What the doubles cannot prove, against a real kube-apiserver: its defaults, versions, conflicts, rights and watches.

Skipped where KUBEBUILDER_ASSETS names no binaries. There are no controllers: tests do what Argo, Kueue, Trainer would.
"""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from components.exit_codes import exit_code_of
from components.lora_rl.trainjob.api import JOBSET_LABEL, TrainJobApi
from components.lora_rl.trainjob.launcher import launch
from components.lora_rl.trainjob.manifest import GROUP, PLURAL, VERSION, job_name, train_job
from components.lora_rl.trainjob.pods import INDEX_LABEL, Pods
from tests.cluster.api_server import ApiServer, api_server
from tests.cluster.command import ON_A_CLUSTER, RUNS, Command, command
from tests.cluster.kube_api import NAMESPACE
from tests.cluster.rendering import OVERLAYS, overlay
from tests.cluster.test_schedule import Declared
from tests.cluster.trainjob_cluster import INPUTS, OUTPUT, SETTINGS, quick
from tests.tiny_run import tiny_config

__all__ = ["api_server", "command", "quick"]

ARGO = ("--target", "argo")


@pytest.fixture
def submitter(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> ApiServer:
    """The server, to somebody with the rights of tuneloop-submitter alone."""
    return _as(api_server, "tuneloop-submitter", monkeypatch)


@pytest.fixture
def launcher(api_server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> ApiServer:
    """The server, to the account of the step that creates TrainJobs."""
    return _as(api_server, "tuneloop-launcher", monkeypatch)


def _as(server: ApiServer, account: str, monkeypatch: pytest.MonkeyPatch) -> ApiServer:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(account)))
    return server


def argo(server: ApiServer, plural: str) -> dict[str, Any]:
    items = server.admin.list_namespaced_custom_object("argoproj.io", "v1alpha1", NAMESPACE, plural)["items"]
    return {found["metadata"]["name"]: found for found in items}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_taken_and_applied_again_changes_nothing(api_server: ApiServer, name: str):
    api_server.kubectl(overlay(name), "apply")
    again = api_server.kubectl(overlay(name), "apply").splitlines()
    assert len(again) == len(overlay(name))
    assert [line for line in again if not line.endswith(" unchanged")] == []


def test_submit_on_argo(command: Command, submitter: ApiServer):
    first = command.submit(*ARGO)
    assert (first.code, first.err) == (0, "")
    assert "WorkflowTemplate tuneloop-tiny, created" in first.out
    assert "nothing is started" in command.submit(*ARGO).out
    again = command.submit(*ARGO, "--again")
    assert "as it is there already" in again.out  # the server's defaults are no change
    other = command.submit(*ARGO, "--set", "seed=8")
    assert "WorkflowTemplate tuneloop-tiny, replaced" in other.out
    assert {first.run, again.run, other.run} <= set(argo(submitter, "workflows"))
    assert command("status", first.run, *ARGO).out.startswith(f"{first.run}: pending")


def test_schedules_on_argo(tmp_path, command: Command, submitter: ApiServer):
    declared = Declared(tmp_path, command, *ARGO)
    declared.add("algebra", '["0 3 * * *", "30 15 * * 1"]')
    assert declared("apply").code == 0
    names = {"tuneloop-sums", "tuneloop-algebra"}
    made = argo(submitter, "cronworkflows")
    assert names <= set(made)
    assert declared("apply").code == 0
    assert argo(submitter, "cronworkflows") == made  # resourceVersion and all
    assert declared("pause", "tuneloop-sums").code == 0
    assert argo(submitter, "cronworkflows")["tuneloop-sums"]["spec"]["suspend"] is True
    declared.configs.pop("algebra")
    assert declared("apply").code == 0
    assert set(argo(submitter, "cronworkflows")) & names == {"tuneloop-sums"} or _leaves(submitter, "tuneloop-algebra")
    assert declared("delete", "tuneloop-sums").code == 0


def _leaves(server: ApiServer, name: str) -> bool:
    """Whether a CronWorkflow is on its way out: its finalizer waits for the garbage collector."""
    found = argo(server, "cronworkflows").get(name)
    return found is None or "deletionTimestamp" in found["metadata"]


class Jobs:
    """TrainJobs, as Kueue and Trainer see them."""

    def __init__(self, server: ApiServer):
        self._api, self._core = server.admin, server.core
        self.name = job_name(tiny_config(*SETTINGS), OUTPUT)

    def wait_for(self, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        for _ in range(300):
            found = self.find()
            if found and condition(found):
                return found
            threading.Event().wait(0.1)
        raise AssertionError("waited in vain")

    def find(self) -> dict[str, Any] | None:
        items = self._api.list_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL)["items"]
        return next((found for found in items if found["metadata"]["name"] == self.name), None)

    def await_gone(self) -> None:
        for _ in range(100):
            if not self.find():
                return
            threading.Event().wait(0.1)
        raise AssertionError("it stays")

    def change(self, **parts: Any) -> None:
        self._api.patch_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL, self.name, parts)

    def condition(self, kind: str, status: str, reason: str, message: str) -> None:
        found = {"type": kind, "status": status, "reason": reason, "message": message,
                 "lastTransitionTime": "2026-11-23T04:00:00Z"}  # fmt: skip
        self.change(status={"conditions": [found]})


def launched(story: Callable[[], None]) -> tuple[int, str]:
    """The step's exit code and message, while something happens in the cluster."""
    said: list[str] = []
    thread = threading.Thread(target=story, daemon=True)
    thread.start()
    code = exit_code_of(lambda: launch(tiny_config(*SETTINGS), INPUTS, OUTPUT, "fingerprint"),
                        lambda _, message: said.append(message))  # fmt: skip
    thread.join(20)
    return code, "".join(said)


def test_a_train_job_is_created_followed_and_removed(launcher: ApiServer, capfd: pytest.CaptureFixture[str]):
    jobs = Jobs(launcher)

    def story() -> None:
        jobs.wait_for(lambda job: job["spec"]["suspend"])
        jobs.condition("Suspended", "True", "Suspended", "no quota")
        jobs.change(spec={"suspend": False})
        jobs.condition("Complete", "True", "AllJobsCompleted", "done")

    assert launched(story) == (0, "")
    said = capfd.readouterr().out
    assert f"TrainJob {jobs.name} created" in said
    assert f"TrainJob {jobs.name} is complete" in said
    jobs.await_gone()


def test_a_job_of_another_request_makes_room(launcher: ApiServer):
    """Also: conditions that end it badly, and a deletion that holds for the very job that was seen."""
    jobs = Jobs(launcher)
    other = train_job(tiny_config(*SETTINGS), INPUTS, OUTPUT, "another")
    first = launcher.admin.create_namespaced_custom_object(GROUP, VERSION, NAMESPACE, PLURAL, other)

    def story() -> None:
        jobs.wait_for(lambda job: job["metadata"]["uid"] != first["metadata"]["uid"])
        jobs.condition("Failed", "True", "DeadlineExceeded", "too long")

    code, message = launched(story)
    assert (code, "DeadlineExceeded: too long" in message) == (75, True)
    jobs.await_gone()


def test_a_watch_goes_on_where_it_was(launcher: ApiServer):
    jobs = Jobs(launcher)
    api = TrainJobApi(NAMESPACE, 30.0)
    job, made = api.ensure({**train_job(tiny_config(*SETTINGS), INPUTS, OUTPUT, "watched")})
    assert made
    jobs.change(spec={"suspend": False})
    jobs.change(metadata={"labels": {"seen": "second"}})
    seen = list(api.watch(jobs.name, job["metadata"]["resourceVersion"], 2.0))
    assert [one["spec"]["suspend"] for one in seen] == [False, False]
    assert seen[1]["metadata"]["labels"]["seen"] == "second"
    assert list(api.watch(jobs.name, seen[1]["metadata"]["resourceVersion"], 1.0)) == []
    api.delete({"metadata": {**job["metadata"], "uid": "of-another-one"}})
    assert "deletionTimestamp" not in jobs.find()["metadata"]
    api.delete(job)
    api.delete(job)  # while it leaves, or once it is gone
    jobs.await_gone()


def test_pods_are_seen_and_their_logs_asked_for(launcher: ApiServer):
    """There is no kubelet: a pod's status is what the test says it is, and its log cannot be had."""
    api, name = TrainJobApi(NAMESPACE, 5.0), "tuneloop-pods"
    container = {"name": "node", "image": "x:1", "resources": {"requests": {"cpu": "1", "memory": "1Gi"},
                                                                "limits": {"memory": "1Gi"}}}  # fmt: skip
    labels = {JOBSET_LABEL: name, INDEX_LABEL: "0"}
    launcher.core.create_namespaced_pod(
        NAMESPACE, {"metadata": {"name": "node-0", "labels": labels}, "spec": {"containers": [container]}}
    )
    with Pods(api, name, 1) as pods:
        pods.look()
        assert (pods.running, pods.endings) == (False, {})
        _end(launcher, "node-0")
        pods.look()
        [ending] = pods.last_endings()
    assert (ending.node, ending.exit_code, ending.message) == ("0", 2, "no such reward")


def _end(server: ApiServer, pod: str) -> None:
    ended = {"terminated": {"exitCode": 2, "reason": "Error", "message": "no such reward", "finishedAt": None}}
    status = {"name": "node", "image": "x:1", "imageID": "", "ready": False, "restartCount": 0, "state": ended}
    server.core.patch_namespaced_pod_status(
        pod, NAMESPACE, {"status": {"phase": "Failed", "containerStatuses": [status]}}
    )


def test_doctor_asks_as_the_submitter(command: Command, submitter: ApiServer, s3_server):
    arguments = ("--config", str(command.toml), *ON_A_CLUSTER, "--output", RUNS, *ARGO)
    shown = [line.split(maxsplit=1) for line in command("doctor", *arguments).out.splitlines()]
    ok = "\n".join(text for state, text in shown if state == "ok")
    for part in ("https://127.0.0.1", "argoproj.io/v1alpha1: served", "create workflows.argoproj.io: granted"):
        assert part in ok


def test_doctor_compares_with_the_quotas_that_the_server_has(
    command: Command, api_server: ApiServer, s3_server, monkeypatch: pytest.MonkeyPatch
):
    api_server.kubectl(overlay("prod"), "apply")
    monkeypatch.setenv("KUBECONFIG", str(api_server.kubeconfig("admin")))
    settings = ("cluster.queue=tuneloop", 'lora_rl.distributed.launcher="trainjob"')
    arguments = ("--config", str(command.toml), *ON_A_CLUSTER, "--output", RUNS, *ARGO)
    for nodes, state, text in ((2, "ok", "16 nvidia.com/gpu at once"), (3, "FAILED", "24 of 16 nvidia.com/gpu")):
        given = (*settings, f"lora_rl.distributed.trainjob.nodes={nodes}")
        answer = command("doctor", *arguments, *(part for setting in given for part in ("--set", setting)))
        [of_the_queue] = [line for line in answer.out.splitlines() if " cluster queue tuneloop: " in line]
        [of_the_namespace] = [line for line in answer.out.splitlines() if " quotas of the namespace: " in line]
        assert of_the_queue.startswith(state)
        assert of_the_namespace.startswith(state)
        assert text in of_the_queue
