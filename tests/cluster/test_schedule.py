"""`schedule` on Kubeflow Pipelines and on Argo: the cluster has what is declared, whatever happens on the way."""

import copy
from pathlib import Path

import pytest

from components.cron import check_cron
from tests.cluster.command import Answer, Command
from tests.cluster.faulty_server import Fault
from tests.cluster.kfp_server import KfpServer
from tests.cluster.kube_api import KubeApi
from tests.tiny_run import TOML
from tuneloop.errors import UserError


class Declared:
    """A file of schedules that tests change."""

    def __init__(self, folder: Path, command: Command, *target: str):
        self.folder, self._command, self._target = folder, command, target
        self.configs: dict[str, str] = {}
        self.add("sums")

    def add(self, name: str, cron: str = '["0 3 * * *"]', more: str = "suspend = false", rank: int = 4) -> None:
        text = TOML.replace('name = "tiny"', f'name = "{name}"').replace("rank = 4", f"rank = {rank}")
        self.configs[name] = f"""{text}
[promote]
registry = "s3://models/registry"
[cluster.schedule]
runs_uri = "s3://models/runs"
schedules = {cron}
{more}
"""

    def __call__(self, action: str, *more: str, owner: str = "maths") -> Answer:
        for name, text in self.configs.items():
            (self.folder / f"{name}.toml").write_text(text)
        listed = ", ".join(f'"{name}.toml"' for name in self.configs)
        file = self.folder / f"{owner}.toml"
        file.write_text(f'owner = "{owner}"\nconfigs = [{listed}]\n')
        return self._command("schedule", action, str(file), *more, *self._target)


@pytest.fixture
def on_kfp(tmp_path, command, kfp_server) -> Declared:
    return Declared(tmp_path, command)


@pytest.fixture
def on_argo(tmp_path, command, kube_api) -> Declared:
    return Declared(tmp_path, command, "--target", "argo")


def recurring(server: KfpServer) -> list[dict]:
    return server.stored["recurringruns"]


def crons(api: KubeApi) -> dict[str, dict]:
    return {name: found for (plural, name), found in api.objects.items() if plural == "cronworkflows"}


# Kubeflow Pipelines


def test_recurring_run_says_what_is_declared(on_kfp, kfp_server):
    answer = on_kfp("apply")
    assert (answer.code, answer.err) == (0, "")
    assert "create   tuneloop-sums" in answer.out
    [run] = recurring(kfp_server)
    assert run["display_name"] == "tuneloop-sums"
    assert run["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * *"}}
    assert (run["no_catchup"], run["max_concurrency"], run["status"]) == (True, "1", "ENABLED")
    assert run["runtime_config"]["parameters"]["output_uri"] == "s3://models/runs/tuneloop-sums-{schedule_time}"
    assert run["pipeline_version_reference"]["pipeline_version_id"]


def test_applying_twice_changes_nothing_the_second_time(on_kfp, kfp_server):
    on_kfp("apply")
    before = [dict(run) for run in recurring(kfp_server)]
    kfp_server.requests.clear()
    answer = on_kfp("apply")
    assert "keep     tuneloop-sums" in answer.out
    assert recurring(kfp_server) == before
    assert {method for method, _ in kfp_server.requests} == {"GET"}


def test_changed_schedule_is_replaced_and_a_gone_one_removed(on_kfp, kfp_server):
    on_kfp.add("products")
    on_kfp("apply")
    del on_kfp.configs["products"]
    on_kfp.add("sums", '["30 4 * * mon-fri"]')
    shown = on_kfp("diff")
    assert shown.out.splitlines() == ["replace  tuneloop-sums", "delete   tuneloop-products"]
    assert len(recurring(kfp_server)) == 2  # diff does nothing
    on_kfp("apply")
    [run] = recurring(kfp_server)
    assert run["trigger"]["cron_schedule"]["cron"] == "0 30 4 * * mon-fri"
    assert run["status"] == "ENABLED"


def test_another_config_is_another_version(on_kfp, kfp_server):
    on_kfp("apply")
    on_kfp.add("sums", rank=2)
    assert "replace  tuneloop-sums" in on_kfp("apply").out
    [run] = recurring(kfp_server)
    assert len(kfp_server.stored["versions"]) == 2
    newest = kfp_server.stored["versions"][-1]["pipeline_version_id"]
    assert run["pipeline_version_reference"]["pipeline_version_id"] == newest


def test_several_expressions_would_overlap_and_are_refused(on_kfp, kfp_server):
    on_kfp.add("sums", '["0 3 * * *", "0 15 * * *"]')
    answer = on_kfp("apply")
    assert answer.code == 2
    assert "their ticks would overlap: write one, such as 0 3,15 * * *" in answer.err
    assert {path for _, path in kfp_server.requests} == {"/apis/v2beta1/healthz"}
    on_kfp.add("sums", '["0 3,15 * * *"]')
    on_kfp("apply")
    assert on_kfp("list").out.split() == ["tuneloop-sums", "active", "0", "3,15", "*", "*", "*"]


def test_pause_and_resume_and_delete(on_kfp, kfp_server):
    on_kfp("apply")
    assert on_kfp("pause", "tuneloop-sums").code == 0
    assert recurring(kfp_server)[0]["status"] == "DISABLED"
    assert "paused" in on_kfp("list").out
    on_kfp("resume", "tuneloop-sums")
    assert recurring(kfp_server)[0]["status"] == "ENABLED"
    on_kfp("pause", "tuneloop-sums")
    assert "resume   tuneloop-sums" in on_kfp("apply").out  # the file says that it runs
    assert on_kfp("delete", "tuneloop-sums").code == 0
    assert recurring(kfp_server) == []
    missing = on_kfp("pause", "tuneloop-sums")
    assert missing.code == 2
    assert "no such schedule of maths; there are: none" in missing.err


@pytest.mark.parametrize("how", ["delete", "replace"])
def test_ticks_at_work_outlive_their_schedule(on_kfp, kfp_server, how):
    on_kfp("apply")
    tick = {
        "display_name": "tick",
        "state": "RUNNING",
        "recurring_run_id": recurring(kfp_server)[0]["recurring_run_id"],
    }
    kfp_server.stored["runs"].append(tick)
    on_kfp.add("sums", '["30 4 * * *"]')
    assert (on_kfp("apply") if how == "replace" else on_kfp("delete", "tuneloop-sums")).code == 0
    assert tick["state"] == "RUNNING"


def test_status_that_kubeflow_does_not_know_yet_is_as_it_was_asked_for(on_kfp, kfp_server):
    on_kfp.add("sums", more="suspend = true")
    on_kfp("apply")
    recurring(kfp_server)[0] |= {"status": "STATUS_UNSPECIFIED", "mode": "ENABLE"}
    assert on_kfp("diff").out == "pause    tuneloop-sums\n"
    recurring(kfp_server)[0] |= {"mode": "DISABLE"}
    assert on_kfp("diff").out == "keep     tuneloop-sums\n"


def test_declared_as_paused_it_never_ran(on_kfp, kfp_server):
    on_kfp.add("sums", more="suspend = true")
    on_kfp("apply")
    assert recurring(kfp_server)[0]["status"] == "DISABLED"
    assert not [path for _, path in kfp_server.requests if path.endswith(":enable")]
    assert "keep     tuneloop-sums" in on_kfp("apply").out


def test_schedules_of_others_are_left_alone(on_kfp, kfp_server):
    on_kfp("apply", owner="physics")
    kfp_server.stored["recurringruns"][0]["display_name"] = "tuneloop-other"
    foreign = dict(recurring(kfp_server)[0])
    on_kfp("apply")
    del on_kfp.configs["sums"]
    on_kfp("apply")
    assert recurring(kfp_server) == [foreign]


@pytest.mark.parametrize("fault", ["429", "503", "lost", "401"])
def test_trouble_on_the_way_makes_one_recurring_run(on_kfp, kfp_server, fault, monkeypatch):
    faults = {
        "429": Fault(status=429, method="POST", times=2, headers={"Retry-After": "0"}),
        "503": Fault(status=503, times=2),
        "lost": Fault(method="POST", path="recurringruns", done=True),
        "401": Fault(status=401, path="recurringruns"),
    }
    monkeypatch.setenv("TUNELOOP_KFP_TOKEN", "valid")
    kfp_server.faults.append(faults[fault])
    assert on_kfp("apply").code == 0
    [run] = recurring(kfp_server)
    assert run["status"] == "ENABLED"


def test_refused_schedule_leaves_nothing(on_kfp, kfp_server):
    kfp_server.faults.append(Fault(status=403, method="POST", path="recurringruns"))
    answer = on_kfp("apply")
    assert answer.code == 2
    assert "you may not do this" in answer.err
    assert all(not records for records in kfp_server.stored.values())


def test_killed_half_way_it_is_completed_by_the_next_apply(on_kfp, kfp_server):
    on_kfp("apply")
    on_kfp.add("sums", '["30 4 * * *"]')
    kfp_server.faults.append(Fault(status=403, method="DELETE", path="recurringruns"))
    assert on_kfp("apply").code == 2  # the new one is there, disabled, and the old one goes on
    assert [run["status"] for run in recurring(kfp_server)] == ["ENABLED", "DISABLED"]
    assert "replace  tuneloop-sums" in on_kfp("apply").out
    [run] = recurring(kfp_server)
    assert (run["trigger"]["cron_schedule"]["cron"], run["status"]) == ("0 30 4 * * *", "ENABLED")


def test_time_zone_that_kubeflow_does_not_read_is_refused(on_kfp, kfp_server):
    on_kfp.add("sums", more='suspend = false\ntimezone = "Europe/Berlin"')
    answer = on_kfp("apply")
    assert answer.code == 2
    assert "Kubeflow Pipelines reads cron in its own time zone, UTC" in answer.err
    assert {path for _, path in kfp_server.requests} == {"/apis/v2beta1/healthz"}
    assert on_kfp("apply", "--server-timezone", "Europe/Berlin").code == 0


# Argo


def test_cron_workflow_says_what_is_declared(on_argo, kube_api):
    on_argo.add("sums", more='suspend = false\ntimezone = "Europe/Berlin"')
    assert on_argo("apply").code == 0
    [cron] = crons(kube_api).values()
    spec = cron["spec"]
    assert (spec["schedules"], spec["timezone"], spec["suspend"]) == (["0 3 * * *"], "Europe/Berlin", False)
    assert (spec["concurrencyPolicy"], spec["startingDeadlineSeconds"]) == ("Forbid", 3600)
    assert ("workflowtemplates", "tuneloop-sums") in kube_api.objects


def test_argo_applying_twice_changes_nothing_the_second_time(on_argo, kube_api):
    on_argo("apply")
    before = dict(kube_api.objects)
    kube_api.requests.clear()
    assert "keep     tuneloop-sums" in on_argo("apply").out
    assert kube_api.objects == before
    assert {method for method, _ in kube_api.requests} == {"GET"}


def test_argo_changes_pauses_and_removes(on_argo, kube_api):
    on_argo.add("products")
    on_argo("apply")
    del on_argo.configs["products"]
    on_argo.add("sums", '["30 4 * * *"]')
    assert on_argo("diff").out.splitlines() == ["replace  tuneloop-sums", "delete   tuneloop-products"]
    on_argo("apply")
    [(name, cron)] = crons(kube_api).items()
    assert (name, cron["spec"]["schedules"]) == ("tuneloop-sums", ["30 4 * * *"])
    on_argo("pause", "tuneloop-sums")
    assert crons(kube_api)[name]["spec"]["suspend"] is True
    assert "resume   tuneloop-sums" in on_argo("apply").out
    assert crons(kube_api)[name]["spec"]["suspend"] is False
    on_argo("delete", "tuneloop-sums")
    assert crons(kube_api) == {}


def test_argo_conflict_is_read_again(on_argo, kube_api):
    on_argo("apply")
    on_argo.add("sums", '["30 4 * * *"]')
    kube_api.faults.append(Fault(status=409, method="PUT", path="cronworkflows"))
    assert on_argo("apply").code == 0
    assert crons(kube_api)["tuneloop-sums"]["spec"]["schedules"] == ["30 4 * * *"]


def test_argo_refused_schedule_leaves_nothing(on_argo, kube_api):
    kube_api.faults.append(Fault(status=403, method="POST", path="cronworkflows"))
    assert on_argo("apply").code == 2
    assert kube_api.objects == {}


def test_argo_ticks_at_work_outlive_their_schedule(on_argo, kube_api):
    on_argo("apply")
    assert on_argo("delete", "tuneloop-sums").code == 0
    assert kube_api.propagation == {("cronworkflows", "tuneloop-sums"): "Orphan"}  # it owns its Workflows


@pytest.mark.parametrize("owner", ["tuneloop-schedules-physics", ""])
def test_argo_schedule_of_somebody_else_is_not_taken_over(on_argo, kube_api, owner):
    on_argo("apply")
    kube_api.objects["cronworkflows", "tuneloop-sums"]["metadata"]["labels"]["app.kubernetes.io/managed-by"] = owner
    before = copy.deepcopy(kube_api.objects)
    on_argo.add("sums", rank=2)
    answer = on_argo("apply")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert f"tuneloop-sums: is {'of physics' if owner else 'somebody else'}" in answer.err
    assert kube_api.objects == before


def test_argo_pause_keeps_what_somebody_else_changes_meanwhile(on_argo, kube_api):
    on_argo("apply")
    kube_api.requests.clear()
    assert on_argo("pause", "tuneloop-sums").code == 0
    assert [method for method, _ in kube_api.requests] == ["GET", "PATCH"]  # the whole object is never sent


def test_argo_newest_runs_are_found_among_very_many(command, kube_api):
    for number in range(700):
        metadata = {"name": f"run-{number:03}", "labels": {"app.kubernetes.io/part-of": "tuneloop"},
                    "creationTimestamp": f"2026-11-23T04:{number // 60:02}:{number % 60:02}Z"}  # fmt: skip
        kube_api.objects["workflows", f"run-{number:03}"] = {"metadata": metadata, "spec": {}}
    assert command("status", "--target", "argo").out.splitlines()[1].startswith("run-699 ")


def test_namespace_is_the_configs_or_the_options(on_kfp, kfp_server):
    kfp_server.multi_user = True
    on_kfp.add("sums", more='suspend = false\n[cluster]\nnamespace = "team-a"')
    assert on_kfp("apply").code == 0
    assert kfp_server.stored["pipelines"][0]["namespace"] == "team-a"
    assert on_kfp("list").out.startswith("tuneloop-sums")
    on_kfp.add("other")
    assert "of the namespaces team-a, tuneloop; make a file for each" in on_kfp("apply").err
    assert on_kfp("diff", "--namespace", "team-b").code == 0


# The file


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 3 * *", "expected 5 fields"),
        ("60 3 * * *", "'60' is no minute, which is 0 to 59"),
        ("0 3 * * 7", "'7' is no day of week, which is 0 to 6; Sunday is 0"),
        ("0 5-3 * * *", "ends before it begins"),
        ("*/0 * * * *", "every 0 is no step of a minute"),
        ("0 3 32 * *", "'32' is no day of month"),
        ("@daily", "expected 5 fields"),
        ("0 3 ? * *", "'?' is no day of month"),
    ],
)
def test_cron_is_read_strictly(text, message):
    with pytest.raises(UserError, match="cron") as error:
        check_cron(text)
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["0 3 * * *", "*/15 0-6,22 1 jan-mar sun", "5 4 * * MON"])
def test_cron_that_both_backends_read(text):
    assert check_cron(text) == text


def test_mistakes_are_found_before_the_cluster_is_asked(on_kfp, kfp_server):
    on_kfp.add("sums", '["0 3 * * 7"]')
    assert "Sunday is 0" in on_kfp("apply").err
    on_kfp.configs["sums"] = on_kfp.configs["sums"].split("[cluster.schedule]")[0]
    assert "has no [cluster.schedule]" in on_kfp("apply").err
    on_kfp.add("sums")
    on_kfp.configs["sums"] = on_kfp.configs["sums"].replace("s3://models/registry", "registry")
    assert "promote.registry" in on_kfp("apply").err
    on_kfp.add("sums")
    on_kfp.configs["again"] = on_kfp.configs["sums"]
    assert "two configs are called sums" in on_kfp("apply").err
    assert on_kfp("apply", owner="No Owner").code == 2
    assert kfp_server.requests == []
