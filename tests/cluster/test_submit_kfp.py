"""`submit` on Kubeflow Pipelines: once, whatever happens on the way, and nothing left behind by a failure."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from werkzeug.wrappers import Response

from components.api_calls import ApiServer, Refused
from tests.cluster.command import RUNS, Command
from tests.cluster.faulty_server import Fault
from tests.cluster.kfp_server import KfpServer
from tests.cluster.kube_api import write_kubeconfig

ONE_OF_EACH = {"pipelines": 1, "versions": 1, "experiments": 1, "runs": 1, "recurringruns": 0}
NOTHING = dict.fromkeys(ONE_OF_EACH, 0)
NO_ADDRESSES = ("http://", "http://a b", "http://[::1", "http://x:notaport", "htp://x")


def counts(server: KfpServer) -> dict[str, int]:
    return {kind: len(records) for kind, records in server.stored.items()}


def test_submit_starts_the_run_with_its_parameters_and_says_where_it_is(command: Command, kfp_server: KfpServer):
    answer = command.submit()
    assert (answer.code, answer.err) == (0, "")
    assert counts(kfp_server) == ONE_OF_EACH
    [run], [version] = kfp_server.stored["runs"], kfp_server.stored["versions"]
    parameters = run["runtime_config"]["parameters"]
    assert run["display_name"] == answer.run
    assert run["service_account"] == "tuneloop-step"  # a server for a single user takes it too
    assert parameters["output_uri"] == f"{RUNS}/{answer.run}"
    assert json.loads(parameters["config"])["promote"]["registry"] == "s3://models/registry"
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert version["name"].startswith("tuneloop-tiny-")
    assert set(version["pipeline_spec"]) == {"pipeline_spec", "platform_spec"}
    assert f"{kfp_server.url}/#/runs/details/{run['run_id']}" in answer.out


def test_kfps_own_file_of_contexts_is_neither_made_nor_changed(command: Command, kfp_server: KfpServer, monkeypatch):
    import kfp

    context = command.toml.parent / "kfp" / "context.json"
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(context))
    kfp_server.multi_user = True
    assert command.submit().code == 0
    assert not context.parent.exists()


def test_submit_again_says_so_and_starts_nothing(command: Command, kfp_server: KfpServer):
    first = command.submit()
    for state in ("PENDING", "RUNNING", "SUCCEEDED"):
        kfp_server.stored["runs"][0]["state"] = state
        again = command.submit()
        assert again.code == 0
        assert f"{first.run} was submitted before and is {state.lower()}; nothing is started" in again.out
        assert kfp_server.stored["runs"][0]["run_id"] in again.out
    assert counts(kfp_server) == ONE_OF_EACH


def test_a_run_that_failed_is_started_again_into_its_folder_with_more_memory(command: Command, kfp_server: KfpServer):
    first = command.submit()
    kfp_server.end(kfp_server.stored["runs"][0], "FAILED")
    again = command.submit("--set", "cluster.steps.lora_rl.memory=96Gi")
    assert again.run == first.run
    assert "started again, because it failed" in again.out
    outputs = [run["runtime_config"]["parameters"]["output_uri"] for run in kfp_server.stored["runs"]]
    assert outputs == [f"{RUNS}/{first.run}"] * 2
    assert counts(kfp_server) == {**ONE_OF_EACH, "versions": 2, "runs": 2}
    third = command.submit("--set", "cluster.steps.lora_rl.memory=96Gi")  # the newest run counts
    assert "is pending; nothing is started" in third.out


def test_again_is_another_run_in_a_folder_of_its_own(command: Command, kfp_server: KfpServer):
    first = command.submit()
    second, third = command.submit("--again"), command.submit("--again")
    assert [second.run, third.run] == [f"{first.run}-2", f"{first.run}-3"]
    assert counts(kfp_server) == {**ONE_OF_EACH, "runs": 3}


def test_the_name_follows_what_decides_the_result(command: Command, kfp_server: KfpServer):
    names = {
        command.submit().run,
        command.submit("--set", "seed=4").run,
        command.submit(output="s3://models/elsewhere").run,
        command.submit("--set", "cluster.shm=1Gi").run,
    }
    assert len(names) == 3


def test_a_given_name_stands_for_one_config(command: Command, kfp_server: KfpServer):
    assert command.submit("--run", "mine").run == "mine"
    refused = command.submit("--run", "mine", "--set", "seed=9")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "mine: is the name of a run with another config" in refused.err


@pytest.mark.parametrize("path", ["/pipelines", "/upload_version", "/experiments", "/runs"])
@pytest.mark.parametrize("status", [0, 503, 409])
def test_an_answer_that_is_lost_makes_no_second_one(command: Command, kfp_server: KfpServer, path, status):
    kfp_server.faults.append(Fault("POST", path, status, done=True))
    answer = command.submit()
    assert answer.code == 0, answer.err
    assert counts(kfp_server) == ONE_OF_EACH
    assert kfp_server.faults[0].times == 0


def test_throttling_is_waited_out_for_as_long_as_the_server_asks(command: Command, kfp_server: KfpServer):
    kfp_server.faults.append(Fault("POST", "/runs", 429, headers={"Retry-After": "1"}))
    began = time.monotonic()
    assert command.submit().code == 0
    assert time.monotonic() - began >= 1.0
    assert counts(kfp_server) == ONE_OF_EACH


def test_throttling_past_our_patience_is_one_line(command: Command, kfp_server: KfpServer):
    kfp_server.faults.append(Fault("GET", "/runs", 429, times=99, headers={"Retry-After": "3600"}))
    answer = command.submit()
    assert (answer.code, answer.err.count("\n")) == (75, 1)
    assert "is too busy (429), and asks to wait 3600 s" in answer.err
    assert counts(kfp_server) == NOTHING


def test_a_server_that_goes_away_for_a_while_is_waited_for(command: Command, kfp_server: KfpServer):
    kfp_server.away_until = time.monotonic() + 1.5
    kfp_server.faults.append(Fault("", "/upload_version", 503, times=2))
    answer = command.submit()
    assert answer.code == 0, answer.err
    assert counts(kfp_server) == ONE_OF_EACH
    assert "trying for up to 120 s" in answer.err


def test_a_server_that_is_gone_for_good_is_one_line(command: Command, kfp_server: KfpServer):
    kfp_server.away_until = time.monotonic() + 60
    answer = command.submit("--patience", "0.5")
    assert answer.code == 75
    assert answer.err.splitlines()[-1].startswith(f"error: Kubeflow Pipelines at {kfp_server.url}: cannot be reached")
    assert counts(kfp_server) == NOTHING


def test_a_run_that_is_refused_leaves_nothing_behind(command: Command, kfp_server: KfpServer):
    kfp_server.faults.append(Fault("POST", "/runs", 400))
    answer = command.submit()
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "refused (400: on purpose)" in answer.err
    assert counts(kfp_server) == NOTHING


def test_what_was_there_before_a_failed_submit_stays(command: Command, kfp_server: KfpServer):
    command.submit()
    kfp_server.faults.append(Fault("POST", "/runs", 400))
    assert command.submit("--set", "seed=8").code == 2
    assert counts(kfp_server) == ONE_OF_EACH


def test_what_somebody_else_made_meanwhile_stays(command: Command, kfp_server: KfpServer):
    kfp_server.faults += [Fault("POST", "/v2beta1/pipelines", 409, done=True), Fault("POST", "/runs", 400)]
    assert command.submit().code == 2
    assert counts(kfp_server) == {**NOTHING, "pipelines": 1}


@pytest.mark.parametrize("operation", ["CreatePipeline", "UploadPipelineVersion", "CreateExperiment", "CreateRun"])
def test_ctrl_c_on_the_way_leaves_nothing_behind(command: Command, kfp_server: KfpServer, monkeypatch, operation):
    carry_out = getattr(kfp_server, f"_{operation}")

    def interrupted(*arguments, **more):
        result = carry_out(*arguments, **more)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return result

    monkeypatch.setattr(kfp_server, f"_{operation}", interrupted)
    answer = command.submit()
    assert (answer.code, answer.err.count("\n")) == (75, 1)
    assert counts(kfp_server) == NOTHING


def test_what_cannot_be_removed_is_named(command: Command, kfp_server: KfpServer):
    kfp_server.faults += [Fault("POST", "/runs", 400), Fault("DELETE", "/experiments", 403)]
    answer = command.submit()
    assert answer.code == 2
    assert answer.err.splitlines()[0].startswith("warning: experiment tuneloop may be left")
    assert counts(kfp_server) == {**NOTHING, "experiments": 1}


def test_an_expired_token_is_one_line(command: Command, kfp_server: KfpServer, monkeypatch):
    kfp_server.token = "new"
    monkeypatch.setenv("TUNELOOP_KFP_TOKEN", "old")
    answer = command.submit()
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "does not know you (401: the token has expired); set TUNELOOP_KFP_TOKEN" in answer.err
    assert "old" not in answer.err
    monkeypatch.setenv("TUNELOOP_KFP_TOKEN", "new")
    assert command.submit().code == 0


def test_a_token_file_is_read_again_when_its_owner_renews_it(
    command: Command, kfp_server: KfpServer, monkeypatch, tmp_path
):
    kfp_server.token = "first"
    token = tmp_path / "token"
    token.write_text("first\n")
    monkeypatch.setenv("TUNELOOP_KFP_TOKEN_FILE", str(token))
    upload = kfp_server._UploadPipelineVersion

    def renew(*arguments, **more):
        kfp_server.token = "second"
        token.write_text("second\n")
        return upload(*arguments, **more)

    monkeypatch.setattr(kfp_server, "_UploadPipelineVersion", renew)
    assert command.submit().code == 0
    assert counts(kfp_server) == ONE_OF_EACH


def test_a_credential_may_end_with_a_line_and_hold_none(command: Command, kfp_server: KfpServer, monkeypatch):
    kfp_server.token = "valid"
    monkeypatch.setenv("TUNELOOP_KFP_TOKEN", "valid\n")
    assert command.submit().code == 0
    for variable, value in (("TUNELOOP_KFP_TOKEN", "val\nid"), ("TUNELOOP_KFP_COOKIES", "session=“abc”")):
        monkeypatch.setenv(variable, value)
        answer = command.submit()
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert f"{variable}: holds a character that a request cannot carry" in answer.err
        assert value not in answer.err
        monkeypatch.delenv(variable)


def test_a_login_page_is_one_line(command: Command, kfp_server: KfpServer):
    kfp_server.faults.append(Fault("GET", "", 302, headers={"Location": "https://login.invalid/dex"}))
    answer = command.submit()
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "does not know you (302" in answer.err


def test_a_page_for_people_is_one_line(command: Command, kfp_server: KfpServer, monkeypatch):
    for page in (Response("<html>Sign in</html>", content_type="text/html"), Response("not here", status=404)):
        monkeypatch.setattr(kfp_server, "answer", lambda asked, page=page: page)
        answer = command.submit()
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert "is not its API; name the address below which /apis/v2beta1 is" in answer.err


def test_cookies_come_from_the_environment(command: Command, kfp_server: KfpServer, monkeypatch):
    seen = []
    answer_of = kfp_server.answer
    monkeypatch.setattr(
        kfp_server, "answer", lambda asked: seen.append(asked.headers.get("Cookie")) or answer_of(asked)
    )
    monkeypatch.setenv("TUNELOOP_KFP_COOKIES", "authservice_session=abc")
    assert command.submit().code == 0
    assert set(seen) == {"authservice_session=abc"}


def test_several_users_have_namespaces(command: Command, kfp_server: KfpServer):
    kfp_server.multi_user = True
    assert command.submit("--namespace", "team-a").code == 0
    assert kfp_server.stored["pipelines"][0]["namespace"] == "team-a"
    assert kfp_server.stored["runs"][0]["service_account"] == "tuneloop-step"
    assert (
        json.loads(kfp_server.stored["runs"][0]["runtime_config"]["parameters"]["config"])["cluster"]["namespace"]
        == "team-a"
    )


def test_without_a_host_the_kubeconfig_leads_to_the_server(
    command: Command, kfp_server: KfpServer, monkeypatch, tmp_path
):
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "missing"))
    refused = command.submit()
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "name the server with --host" in refused.err
    for content in ("a: [", "hello", "contexts: {}", "contexts: [1]"):
        (tmp_path / "broken").write_text(content)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "broken"))
        refused = command.submit()
        assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
    kubeconfig = str(write_kubeconfig(tmp_path / "kubeconfig", kfp_server.url, "secret"))
    monkeypatch.setenv("KUBECONFIG", kubeconfig)
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", kubeconfig)  # read at import
    kfp_server.token = "secret"
    assert "the kubeconfig has no such context; it has here" in command.submit("--context", "there").err
    answer = command.submit("--context", "here")
    assert answer.code == 0, answer.err
    assert "port-forward service/ml-pipeline-ui" in answer.out


@pytest.mark.parametrize(
    ("arguments", "output", "fragment"),
    [
        ([], "runs", "--output runs: steps of a cluster share an object store and no disk"),
        ([], "s3://", "--output s3://"),
        ([], "s3:///runs", "--output s3:///runs"),
        (["--set", "promote.registry=registry"], RUNS, "promote.registry = registry: is a folder"),
        (["--set", "model.uri=../model"], RUNS, "model.uri = ../model: is on this machine"),
        (
            ["--set", 'data_prep.sources=[{kind="jsonl", uri="rows.jsonl"}]'], RUNS,
            "data_prep.sources[0].uri = rows.jsonl: is on this machine",
        ),
        (["--set", "lora.start_from=adapters/old"], RUNS, "lora.start_from = adapters/old: is on this machine"),
        (["--set", "check.gpu=l4-24gb", "--set", "model.uri=hf://Qwen/Qwen2.5-72B-Instruct"], RUNS, "does not fit"),
        (["--run", "Not a name"], RUNS, "--run 'Not a name'"),
        (["--package", "x.yaml"], RUNS, "--package: is of --target vertex alone"),
        (["--patience", "soon"], RUNS, "'soon' is no number of seconds"),
        (["--ca-file", "none.pem"], RUNS, "--ca-file none.pem: cannot be read (No such file"),
        (["--ca-file", "runs.txt"], RUNS, "--ca-file runs.txt: holds no certificate in PEM format"),
        *((["--host", host], RUNS, f"--host {host}: is no address; write https://host") for host in NO_ADDRESSES),
        (["--target", "vertex", "--wait"], RUNS, "drop --wait"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_a_server_is_asked(
    command: Command, kfp_server: KfpServer, arguments, output, fragment
):
    Path("runs.txt").write_text("no certificate")
    answer = command.submit(*arguments, output=output)
    assert (answer.code, answer.err.count("\n")) == (2, 1), answer.err
    assert answer.err.startswith("error: ")
    assert fragment in answer.err
    assert kfp_server.requests == []


def test_an_unknown_host_is_one_line_at_once(command: Command, kfp_server: KfpServer):
    answer = command.submit("--host", "https://kubeflow.invalid")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "no such host" in answer.err


def test_vertex_gets_a_package_and_says_what_to_do_with_it(command: Command, kfp_server: KfpServer, tmp_path):
    answer = command.submit("--target", "vertex", "--run", "first")
    assert answer.code == 0, answer.err
    assert (tmp_path / "first.vertex.yaml").read_text().count("\n---\n") == 0
    assert "console.cloud.google.com/vertex-ai/pipelines" in answer.out
    assert f"output_uri: {RUNS}/first" in answer.out
    assert kfp_server.requests == []


def test_what_the_upload_server_says_is_shown_without_its_stack():
    class Failed(Exception):
        status, reason, headers = 400, "Bad Request", {}
        body = '{"error_message": "the file is no pipeline spec", "error_details": "at line 1 of a stack"}'

    def upload() -> None:
        raise Failed

    with pytest.raises(Refused) as error:
        ApiServer("Kubeflow Pipelines", "log in").call(upload)
    assert str(error.value) == "Kubeflow Pipelines: refused (400: the file is no pipeline spec)"
