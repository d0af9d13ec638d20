"""The compiled pipeline is checked in; the DAG in it is the one that run folders and resuming rely on."""

import resource
import subprocess
import sys

import pytest
import yaml

from pipelines.compile import COMPILED, check_compiled, compile_pipeline
from pipelines.steps import STEPS
from tuneloop.errors import UserError


def test_checked_in_yaml_is_current():
    check_compiled()


def test_other_sdk_version_is_no_difference_and_another_default_is(tmp_path):
    copy = tmp_path / COMPILED.name
    text = COMPILED.read_text()
    copy.write_text(text.replace("sdkVersion: kfp-", "sdkVersion: kfp-9."))
    check_compiled(copy)
    copy.write_text(text.replace("tuneloop/train:dev", "tuneloop/train:old", 1))
    with pytest.raises(UserError, match="python -m pipelines compile"):
        check_compiled(copy)


def test_compiles_in_under_five_seconds(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys, pathlib, pipelines.compile as c; c.compile_pipeline(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.yaml")], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_graph_is_the_one_of_run_folders(tmp_path):
    """Every input of every step comes from the step that `STEPS` says, and the console's form has nine parameters."""
    spec = yaml.safe_load(compile_pipeline(tmp_path / "p.yaml").read_text())
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    tasks |= spec["components"]["comp-condition-2"]["dag"]["tasks"]
    tasks |= spec["components"]["comp-condition-3"]["dag"]["tasks"]
    found = {}
    for name, task in tasks.items():
        if name.startswith("condition-"):
            continue
        inputs = task["inputs"]["parameters"]
        found[name.replace("-", "_")] = {
            key: source.replace("-", "_")
            for key, value in inputs.items()
            if key not in ("config", "output_uri") and (source := _producer(value))
        }
    assert found == STEPS
    assert "merge-adapter" in tasks["evaluate"]["dependentTasks"]
    assert "data-prep-Output'] == true" in tasks["condition-2"]["triggerPolicy"]["condition"]
    assert "evaluate-Output'] == true" in tasks["condition-3"]["triggerPolicy"]["condition"]
    report = spec["root"]["dag"]["tasks"]["report"]
    assert report["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert set(spec["root"]["inputDefinitions"]["parameters"]) == {
        "config", "base_model", "dataset_uri", "output_uri", "updates", "lora_rank", "learning_rate", "adapter_name",
        "schedule_time",
    }  # fmt: skip


def _producer(value: dict) -> str:
    """The step behind a task's parameter; inside a condition it is named by the channel."""
    if "taskOutputParameter" in value:
        return value["taskOutputParameter"]["producerTask"]
    channel = value.get("componentInputParameter", "")
    name, _, output = channel.removeprefix("pipelinechannel--").rpartition("-")
    return name if output in ("Output", "uri") else ""


def test_no_step_is_cached_by_the_backend():
    spec = yaml.safe_load(COMPILED.read_text())
    for component in spec["components"].values():
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            if not name.startswith("condition"):
                assert task["cachingOptions"] == {}, name  # enableCaching is false, the default that protobuf omits
