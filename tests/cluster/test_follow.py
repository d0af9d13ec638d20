"""A run on a cluster, looked at until it ends: its table, its log, its result and its report."""

import io
import json
import os
import signal
import threading
import time
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
from urllib3 import HTTPResponse

from components.api_calls import ApiServer
from components.pod_log import PodLog
from pipelines.cluster import metrics, pods, watch
from pipelines.cluster.run_view import RunView, StepView
from pipelines.cluster.table import StepTable
from tests.cluster.command import RUNS, Command
from tests.cluster.faulty_server import Fault
from tests.cluster.kfp_server import KfpServer
from tests.cluster.kube_api import KubeApi
from tests.s3_server import S3Server
from tuneloop.storage import write_file


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often."""
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(pods, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(metrics, "EVERY_SECONDS", 0.0)


def leave(run: str, file: str, content: object) -> None:
    """Put JSON, or text as it is, into the run's folder."""
    text = content if isinstance(content, str) else json.dumps(content)
    write_file(f"{RUNS}/{run}/{file}", text.encode())


@pytest.mark.parametrize(
    ("state", "files", "code", "line"),
    [
        ("SUCCEEDED", {"report.json": {"status": "promoted", "gate": {"reason": "better"}}}, 0, "better; promoted"),
        ("SUCCEEDED", {"report.json": {"status": "kept", "gate": {"reason": "too close"}}}, 3, "not passed: too close"),
        ("SUCCEEDED", {"report.json": {"status": "skipped"}}, 0, "the data is unchanged"),
        ("SUCCEEDED", {}, 0, "it has left no report"),
        (
            "FAILED", {"check.failed.json": {"step": "check", "exit_code": 2, "message": "no such model"}}, 2,
            "error: check: no such model",
        ),
        (
            "FAILED", {"check.failed.json": {"step": "check", "exit_code": 75, "message": "storage is away"}}, 75,
            "error: check: storage is away",
        ),
        ("FAILED", {}, 1, "error: the run failed; the log of its last step says why"),
        ("CANCELED", {}, 75, "error: the run was cancelled; the same submit continues it"),
    ],
)  # fmt: skip
def test_wait_exits_with_the_runs_result(
    command: Command, kfp_server: KfpServer, s3_server: S3Server, state, files, code, line
):
    name = command.submit().run
    run = kfp_server.run(name)
    kfp_server.set_step(run, "check", "FAILED" if state == "FAILED" else "SUCCEEDED")
    kfp_server.end(run, state)
    for file, content in files.items():
        leave(name, file, content)
    answer = command("status", name, "--watch")
    assert answer.code == code
    assert line in answer.out + answer.err
    assert answer.err.count("\n") == (code not in (0, 3))


def test_a_failure_of_an_earlier_attempt_is_not_this_ones(command: Command, kfp_server: KfpServer, s3_server: S3Server):
    name = command.submit().run
    run = kfp_server.run(name)
    kfp_server.set_step(run, "check", "FAILED")
    kfp_server.end(run, "FAILED")
    leave(name, "lora_rl.failed.json", {"step": "lora_rl", "exit_code": 2, "message": "old"})
    assert "old" not in command("status", name, "--watch").err


def test_watch_shows_states_and_metrics_through_a_server_that_goes_away(
    command: Command, kfp_server: KfpServer, s3_server: S3Server
):
    def happen() -> None:
        while not kfp_server.stored["runs"]:
            time.sleep(0.02)
        [run] = kfp_server.stored["runs"]
        rows = [{"update": 6, "validation/accuracy": 0.5}, {"update": 7, "reward/mean": 0.25}]
        leave(run["display_name"], "lora_rl.partial/metrics.jsonl", "\n".join(map(json.dumps, rows)))
        leave(run["display_name"], "check/step.json", {"summary": {"parameters": 1234}})
        run["state"] = "RUNNING"
        kfp_server.set_step(run, "check", "SUCCEEDED")
        kfp_server.set_step(run, "lora-rl", "RUNNING")
        time.sleep(0.5)
        kfp_server.faults += [Fault("GET", "/runs/", 0), Fault("GET", "/runs/", 503)]
        time.sleep(0.5)
        leave(run["display_name"], "lora_rl/step.json", {"summary": {"validation_accuracy_last": 0.75}})
        kfp_server.set_step(run, "lora-rl", "SUCCEEDED")
        leave(run["display_name"], "report.json", {"status": "promoted", "gate": {"reason": "better"}})
        kfp_server.end(run, "SUCCEEDED")

    threading.Thread(target=happen, daemon=True).start()
    answer = command.submit("--watch")
    assert answer.code == 0, answer.err
    lines = [line for line in answer.out.splitlines() if line.partition(":")[0] in ("run", "check", "lora_rl", "gate")]
    assert "check: succeeded after 0:00, 1,234 parameters" in lines
    assert "lora_rl: running, update 7, validation/accuracy 0.5, reward/mean 0.25" in lines
    assert any(line.startswith("lora_rl: succeeded after") and "0.75" in line for line in lines)
    assert lines[-1] == "gate: passed: better; promoted"
    assert [fault.times for fault in kfp_server.faults] == [0, 0]


def test_a_server_that_is_gone_leaves_the_run_and_says_how_to_look_again(command: Command, kfp_server: KfpServer):
    kfp_server.faults.append(Fault("GET", "/runs/", 503, times=99))
    answer = command.submit("--wait", "--patience", "1", "--namespace", "tuneloop")
    assert answer.code == 75
    assert answer.err.endswith(
        f"look again with: python -m pipelines status {answer.run} --namespace tuneloop --watch\n"
    )
    assert kfp_server.stored["runs"][0]["state"] == "PENDING"


def test_ctrl_c_leaves_the_run(command: Command, kfp_server: KfpServer):
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    answer = command.submit("--wait")
    timer.join()
    assert (answer.code, answer.err.count("\n")) == (75, 1)
    assert f"no longer waiting; the run goes on, look again with: python -m pipelines status {answer.run}" in answer.err
    assert kfp_server.stored["runs"][0]["state"] == "PENDING"


def test_the_table_is_drawn_over_the_last_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream = io.StringIO()
    table = StepTable(stream)
    run = RunView("1", "tiny", "running", steps={"check": StepView("running")})
    table.draw(run, {"check": "x" * 200})
    first = stream.getvalue()
    table.draw(run, {})
    assert first.count("\n") == 9
    assert stream.getvalue().removeprefix(first).startswith("\x1b[9F")
    assert max(len(line) for line in first.replace("\x1b[K", "").splitlines()) <= 39  # none wraps


def test_status_lists_the_newest_runs(command: Command, kfp_server: KfpServer):
    assert command("status").out == "there are no runs yet\n"
    names = [command.submit("--run", name).run for name in ("one", "two")]
    lines = command("status").out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", *reversed(names)]
    assert command("status", kfp_server.run("one")["run_id"]).out.startswith("one: pending")


def test_report_of_a_run_on_a_cluster_is_fetched(
    command: Command, kfp_server: KfpServer, s3_server: S3Server, tmp_path
):
    name = command.submit().run
    refused = command("report", name)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    leave(name, "config.json", json.loads(kfp_server.run(name)["runtime_config"]["parameters"]["config"]))
    assert command("report", name, "--to", "early.html").out == "report: early.html\n"  # of a run under way
    assert "<html" in (tmp_path / "early.html").read_text()
    leave(name, "report/report.html", "<html>done</html>")
    assert command("report", name).out == f"report: {name}.html\n"
    assert (tmp_path / f"{name}.html").read_text() == "<html>done</html>"


def labels(run: dict, step: str) -> dict[str, str]:
    return {"pipeline/runid": run["run_id"], "app.kubernetes.io/component": step}


@pytest.fixture
def pods_in_kubeflow(monkeypatch):
    """Where the pods of a server without users are."""
    monkeypatch.setattr("tests.cluster.kube_api.NAMESPACE", "kubeflow")


def test_logs_follow_a_step_through_dropped_connections(
    command: Command, kfp_server: KfpServer, kube_api: KubeApi, pods_in_kubeflow
):
    name = command.submit().run
    run = kfp_server.run(name)
    expected = [f"line {number}" for number in range(12)]

    def happen() -> None:
        time.sleep(0.2)
        kube_api.add_pod("one", labels(run, "check"), "Pending")
        time.sleep(0.2)
        kube_api.pods["one"]["status"]["phase"] = "Running"
        kube_api.write("one", *expected[:4])
        time.sleep(0.3)
        kube_api.cut_logs = 3
        kube_api.write("one", *expected[4:8])
        kube_api.faults.append(Fault("GET", "/log", 503))
        time.sleep(0.3)
        kube_api.write("one", *expected[8:])
        kube_api.pods["one"]["status"]["phase"] = "Succeeded"
        kfp_server.set_step(run, "check", "SUCCEEDED")

    threading.Thread(target=happen, daemon=True).start()
    answer = command("logs", name, "check", "--follow")
    assert answer.code == 0, answer.err
    assert [line.removeprefix("check | ") for line in answer.out.splitlines()[1:]] == expected
    assert kube_api.cut_logs == 0


def test_a_log_is_read_on_from_its_last_line_whatever_the_nodes_time_zone():
    asked: list[dict] = []

    def read_namespaced_pod_log(*_: str, **query: object) -> HTTPResponse:
        asked.append(query)
        now = datetime.now(timezone(timedelta(hours=2))).isoformat(timespec="microseconds")
        return HTTPResponse(io.BytesIO(f"{now[:26]}789{now[26:]} hello\n".encode()), preload_content=False)

    core = SimpleNamespace(read_namespaced_pod_log=read_namespaced_pod_log)
    log = PodLog(ApiServer("Kubernetes", ""), lambda: core, "tuneloop", "one", "main", lambda line: None)
    assert log.read()
    assert log.read()
    assert "since_seconds" not in asked[0]
    assert 5 <= asked[1]["since_seconds"] <= 7


def test_logs_of_all_steps(command: Command, kfp_server: KfpServer, kube_api: KubeApi, pods_in_kubeflow):
    name = command.submit().run
    run = kfp_server.run(name)
    refused = command("logs", name)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "has no pods in kubeflow" in refused.err
    kube_api.add_pod("a", labels(run, "check"), "Succeeded", ("checked",))
    kube_api.add_pod("b", labels(run, "data_prep"), "Running", ("reading",))
    kube_api.add_pod("driver", {"pipeline/runid": run["run_id"]}, "Succeeded", ("of Kubeflow",))
    answer = command("logs", name)
    assert [line for line in answer.out.splitlines() if not line.startswith("──")] == [
        "check | checked", "data_prep | reading",
    ]  # fmt: skip
