"""`submit --target argo`: the WorkflowTemplate as it has to be, the Workflow once, and what was there put back."""

import copy

import pytest

from tests.cluster.command import RUNS, Command
from tests.cluster.faulty_server import Fault
from tests.cluster.kube_api import KubeApi

ARGO = ("--target", "argo")
TEMPLATE = ("workflowtemplates", "tuneloop-tiny")


def workflows(api: KubeApi) -> list[str]:
    return sorted(name for plural, name in api.objects if plural == "workflows")


def test_submit_creates_template_and_workflow(command: Command, kube_api: KubeApi):
    answer = command.submit(*ARGO)
    assert (answer.code, answer.err) == (0, "")
    assert workflows(kube_api) == [answer.run]
    spec = kube_api.objects["workflows", answer.run]["spec"]
    assert spec["workflowTemplateRef"] == {"name": "tuneloop-tiny"}
    assert {"name": "output_uri", "value": f"{RUNS}/{answer.run}"} in spec["arguments"]["parameters"]
    assert "WorkflowTemplate tuneloop-tiny, created" in answer.out
    linked = command.submit(*ARGO, "--ui-host", "https://argo.example/")
    assert "is pending; nothing is started" in linked.out
    assert f"https://argo.example/workflows/tuneloop/{answer.run}" in linked.out


def test_a_template_that_is_there_is_used_or_replaced(command: Command, kube_api: KubeApi):
    first = command.submit(*ARGO)
    version = kube_api.objects[TEMPLATE]["metadata"]["resourceVersion"]
    again = command.submit(*ARGO, "--again")
    assert "as it is there already" in again.out
    assert kube_api.objects[TEMPLATE]["metadata"]["resourceVersion"] == version
    other = command.submit(*ARGO, "--set", "seed=8")
    assert "WorkflowTemplate tuneloop-tiny, replaced" in other.out
    assert workflows(kube_api) == sorted([first.run, again.run, other.run])


def test_a_template_that_others_replace_too_is_read_again(command: Command, kube_api: KubeApi):
    command.submit(*ARGO)
    kube_api.faults.append(Fault("PUT", "", 409, times=3))
    assert command.submit(*ARGO, "--set", "seed=8").code == 0
    kube_api.faults.append(Fault("PUT", "", 0, done=True))  # the answer is lost, and the repeat finds another version
    assert command.submit(*ARGO, "--set", "seed=9").code == 0


def test_a_failed_run_is_another_workflow_of_the_same_run(command: Command, kube_api: KubeApi):
    first = command.submit(*ARGO)
    for attempt in ("", "-r2"):
        kube_api.objects["workflows", f"{first.run}{attempt}"]["status"] = {"phase": "Failed"}
        assert "started again, because it failed" in command.submit(*ARGO).out
    assert workflows(kube_api) == [first.run, f"{first.run}-r2", f"{first.run}-r3"]
    status = command("status", first.run, *ARGO)
    assert status.out.startswith(f"{first.run}: pending")


@pytest.mark.parametrize("path", ["/workflowtemplates", "/workflows"])
@pytest.mark.parametrize("status", [0, 503, 409])
def test_an_answer_that_is_lost_makes_no_second_one(command: Command, kube_api: KubeApi, path, status):
    kube_api.faults.append(Fault("POST", path, status, done=True))
    answer = command.submit(*ARGO)
    assert answer.code == 0, answer.err
    assert len(kube_api.objects) == 2


def test_a_workflow_that_is_refused_leaves_nothing_behind(command: Command, kube_api: KubeApi):
    kube_api.faults.append(Fault("POST", "/workflows", 422))
    answer = command.submit(*ARGO)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "refused (422: on purpose)" in answer.err
    assert kube_api.objects == {}


def test_a_workflow_that_is_refused_puts_the_template_back(command: Command, kube_api: KubeApi):
    command.submit(*ARGO)
    before = copy.deepcopy(kube_api.objects)
    kube_api.faults.append(Fault("POST", "/workflows", 403))
    answer = command.submit(*ARGO, "--set", "seed=8")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "you may not do this" in answer.err
    assert kube_api.objects[TEMPLATE]["spec"] == before[TEMPLATE]["spec"]
    assert kube_api.objects.keys() == before.keys()


def test_the_look_that_is_printed_finds_the_run_in_the_configs_namespace(
    command: Command, kube_api: KubeApi, monkeypatch
):
    monkeypatch.setattr("tests.cluster.kube_api.NAMESPACE", "team-a")
    answer = command.submit(*ARGO, "--set", "cluster.namespace=team-a")
    assert f"status {answer.run} --target argo --namespace team-a" in answer.out


def test_a_pod_without_a_token_is_one_line(command: Command, kube_api: KubeApi, monkeypatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    answer = command.submit(*ARGO)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "mount its service account's token" in answer.err


def test_somebody_elses_template_is_left_alone(command: Command, kube_api: KubeApi):
    command.submit(*ARGO)
    kube_api.objects[TEMPLATE]["metadata"]["labels"] = {}
    before = copy.deepcopy(kube_api.objects)
    answer = command.submit(*ARGO, "--set", "seed=8")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "is somebody else's" in answer.err
    assert kube_api.objects == before


def test_throttling_is_waited_out_and_an_expired_login_is_one_line(command: Command, kube_api: KubeApi):
    kube_api.faults.append(Fault("POST", "/workflows", 429, headers={"Retry-After": "1"}))
    assert command.submit(*ARGO).code == 0
    kube_api.token = "another"
    answer = command.submit(*ARGO)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "does not know you (401: the token has expired); log in to the cluster again" in answer.err


def test_steps_and_outcome_of_a_workflow(command: Command, kube_api: KubeApi, s3_server):
    run = command.submit(*ARGO).run
    nodes = {
        "a": {"displayName": "check", "type": "Pod", "phase": "Succeeded", "startedAt": "2026-11-23T04:00:00Z",
              "finishedAt": "2026-11-23T04:01:05Z"},
        "b": {"displayName": "data-prep", "type": "Retry", "phase": "Running", "startedAt": "2026-11-23T04:02:00Z"},
        "c": {"displayName": "data-prep(0)", "type": "Pod", "phase": "Failed"},
        "d": {"displayName": "main", "type": "DAG", "phase": "Running"},
    }  # fmt: skip
    kube_api.objects["workflows", run]["status"] = {"phase": "Running", "nodes": nodes}
    shown = command("status", run, *ARGO).out.splitlines()
    assert shown[1].split() == ["✓", "check", "succeeded", "1:05"]
    assert shown[2].split()[:3] == ["▶", "data_prep", "running"]
    assert shown[3].split() == ["·", "sft_warmup", "waiting"]
    kube_api.objects["workflows", run]["spec"]["shutdown"] = "Terminate"
    kube_api.objects["workflows", run]["status"]["phase"] = "Failed"
    assert "the run was cancelled" in command("status", run, *ARGO).out
    assert "no such run on the cluster; the newest are" in command("status", "other", *ARGO).err
