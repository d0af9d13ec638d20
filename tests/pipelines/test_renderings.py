"""The checked-in renderings: one pipeline for every backend, valid for each, and nothing that must not be there."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from hera.workflows import models
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from components.check.step import STEP as CHECK
from components.config import load_run_config
from components.node import run_in_pipeline
from components.parameters import PARAMETERS, resolve_parameters
from components.report.step import main as report
from components.runner import fingerprint_from
from components.step_command import main as run_step
from components.step_command import parser_of
from pipelines.argo.artifacts import report_artifact
from pipelines.compile import COMPILED, CONFIG, render
from pipelines.kfp_rendering import config_text
from pipelines.steps import STEPS
from tests.cluster.schemas import KUBERNETES_VERSIONS, problems
from tests.pipelines.graphs import documents, read_argo, read_kubeflow
from tests.tiny_run import tiny_config
from tuneloop.errors import UserError

KUBEFLOW = documents("kubernetes.yaml")
PORTABLE = documents("portable.yaml")
[TEMPLATE] = documents("workflow_template.yaml")
[CRON] = documents("cron_workflow.yaml")
GITOPS = documents("gitops.yaml")
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
SECRET = '{secret="s3", key="%s", optional=%s}'
HOST = ("hostPath", "hostNetwork", "hostPID", "hostIPC", "hostPort")


def values(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf."""
    if isinstance(node, dict):
        for key, child in node.items():
            yield from values(child, f"{path}.{key}")
    elif isinstance(node, list):
        for child in node:
            yield from values(child, path)
    else:
        yield path, node


def test_argo_and_kubeflow_are_the_same_pipeline():
    kubeflow, argo = read_kubeflow(KUBEFLOW), read_argo(TEMPLATE)
    assert argo.after == kubeflow.after
    assert argo.conditions == kubeflow.conditions
    assert argo.inputs == kubeflow.inputs
    for step in ("check", "report"):  # Argo can tell a preemption from a refusal, and repeats them after the one
        assert (argo.pods[step].pop("retries"), kubeflow.pods[step].pop("retries")) == (3, 0)
    assert argo.pods == kubeflow.pods
    assert argo.parameters.keys() == kubeflow.parameters.keys()
    for name, default in kubeflow.parameters.items():
        assert type(default)(argo.parameters[name]) == default, name


def test_graph_is_the_one_of_run_folders():
    """Every input of every step comes from the step that `STEPS` says; merging is before evaluation."""
    found = read_argo(TEMPLATE)
    inputs = {
        step.replace("-", "_"): {key: source.replace("-", "_") for key, source in given.items() if source in found.pods}
        for step, given in found.inputs.items()
    }
    for given in inputs.values():
        given.pop("config", None)
    assert inputs == STEPS | {"report": {}}
    assert "merge-adapter" in found.after["post-training", "data-changed", "evaluate"]
    assert found.conditions == {
        ("post-training", "data-changed"): "data-prep",
        ("post-training", "data-changed", "gate-passed"): "evaluate",
    }


def test_portable_is_the_same_graph_in_one_document():
    [spec], kubernetes = PORTABLE, KUBEFLOW[0]
    assert spec["root"] == kubernetes["root"]
    assert spec["components"].keys() == kubernetes["components"].keys()
    for name, component in kubernetes["components"].items():
        tasks = [component.get("dag", {}).get("tasks", {}), spec["components"][name].get("dag", {}).get("tasks", {})]
        without_retries = [
            {task: {key: value for key, value in one.items() if key != "retryPolicy"} for task, one in dag.items()}
            for dag in tasks
        ]
        assert without_retries[0] == without_retries[1]
    resources = spec["deploymentSpec"]["executors"]["exec-lora-rl"]["container"]["resources"]
    assert resources["accelerator"]["resourceType"] == "NVIDIA_L4"
    assert resources["accelerator"]["resourceCount"] == "1"
    assert (resources["resourceCpuLimit"], resources["resourceMemoryLimit"]) == ("8", "48Gi")
    assert not [key for key in resources if key.endswith("Request")]


def test_gitops_objects_hold_the_kubeflow_pipeline():
    pipeline, version = GITOPS
    assert (pipeline["kind"], version["kind"]) == ("Pipeline", "PipelineVersion")
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == KUBEFLOW[0]["pipelineInfo"]["name"]
    assert [version["spec"]["pipelineSpec"], version["spec"]["platformSpec"]] == KUBEFLOW
    assert version["metadata"]["name"].startswith(f"{pipeline['metadata']['name']}-")


def test_a_changed_pipeline_is_another_version():
    config = load_run_config(CONFIG, ("lora_rl.updates=201",))
    version = list(yaml.safe_load_all(render(config, ("gitops",))["gitops.yaml"]))[1]
    assert version["metadata"]["name"] != GITOPS[1]["metadata"]["name"]


@pytest.mark.parametrize("spec", [KUBEFLOW[0], PORTABLE[0]], ids=["kubernetes", "portable"])
def test_ir_is_a_pipeline_spec(spec):
    message = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    assert json_format.MessageToDict(message) == spec
    with pytest.raises(json_format.ParseError, match="unknown"):
        json_format.ParseDict(spec | {"unknown": 1}, pipeline_spec_pb2.PipelineSpec())


def test_platform_spec_is_of_kubernetes():
    json_format.ParseDict(KUBEFLOW[1], pipeline_spec_pb2.PlatformSpec())
    for executor in KUBEFLOW[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(executor, kubernetes_executor_config_pb2.KubernetesExecutorConfig())


@pytest.mark.parametrize("manifest", [TEMPLATE, CRON], ids=["WorkflowTemplate", "CronWorkflow"])
def test_argo_objects_are_heras_models(manifest):
    model = getattr(models, manifest["kind"])
    kept = json.loads(model.model_validate(manifest).model_dump_json(by_alias=True, exclude_none=True))
    assert set(values(kept)) == set(values(manifest))  # a field that the model does not know would be lost


@pytest.mark.parametrize("manifest", [TEMPLATE, CRON, *GITOPS], ids=lambda manifest: manifest["kind"])
def test_objects_follow_their_custom_resource_definitions(manifest):
    assert problems(manifest, KUBERNETES_VERSIONS[-1]) == []
    broken = manifest | {"spec": manifest["spec"] | {"unknown": 1}}
    assert problems(broken, KUBERNETES_VERSIONS[-1]) != []


def test_every_parameter_has_a_type_and_a_default():
    for spec in (KUBEFLOW[0], PORTABLE[0]):
        parameters = spec["root"]["inputDefinitions"]["parameters"]
        assert set(parameters) == {"config", "output_uri", *PARAMETERS}
        for name, definition in parameters.items():
            assert "defaultValue" in definition, name
            kinds = {str: "STRING", int: "NUMBER_INTEGER", float: "NUMBER_DOUBLE"}
            assert definition["parameterType"] == kinds[PARAMETERS.get(name, str)], name
            assert definition["description"], name
    assert all(isinstance(one["value"], str) for one in TEMPLATE["spec"]["arguments"]["parameters"])


def test_compiled_file_alone_holds_a_run_to_which_only_data_is_given():
    default = KUBEFLOW[0]["root"]["inputDefinitions"]["parameters"]["config"]["defaultValue"]
    assert resolve_parameters(default, {}) == load_run_config(CONFIG)
    run = resolve_parameters(default, {"dataset_uri": "s3://mine/rows.jsonl", "updates": 0, "schedule_time": ""})
    assert run.data_prep.sources[0].uri == "s3://mine/rows.jsonl"
    assert run.lora_rl.updates == 200


def test_config_with_double_braces_survives_templating():
    prompt = r"Say {{workflow.name}} and \{{$.x}} and {day}."
    config = load_run_config(CONFIG, (f"task.system_prompt={json.dumps(prompt)}",))
    assert "{{" not in config_text(config)
    assert resolve_parameters(config_text(config), {}).task.system_prompt == prompt


def test_no_step_is_cached_by_the_backend():
    for spec in (KUBEFLOW[0], PORTABLE[0]):
        for component in spec["components"].values():
            for name, task in component.get("dag", {}).get("tasks", {}).items():
                if not name.startswith("condition"):
                    assert task["cachingOptions"] == {}, name  # enableCaching is false, which protobuf omits


@pytest.mark.parametrize("file", sorted(path.name for path in COMPILED.iterdir()))
def test_nothing_that_must_not_be_there(file):
    text = (COMPILED / file).read_text()
    for forbidden in (*HOST, "privileged", "kind: Secret", "stringData"):
        assert forbidden not in text
    for path, value in values(documents(file)):
        if path.endswith(".image"):
            assert re.search(r":[\w.-]+(@sha256:[0-9a-f]{64})?$", value), value
            assert not value.endswith(":latest")
        if path.endswith("allowPrivilegeEscalation"):
            assert value is False


def test_no_value_of_a_secret_gets_into_a_rendering(monkeypatch):
    config = load_run_config(CONFIG)
    for secret in config.cluster.secrets:
        monkeypatch.setenv(secret.variable, "the-value-of-a-secret")
    assert not any("the-value-of-a-secret" in text for text in render(config).values())


@pytest.mark.parametrize(
    ("override", "setting"),
    [
        ('tracking.mlflow={uri="https://me:the-password@mlflow.example"}', "tracking.mlflow.uri"),
        ('data_prep.sources=[{kind="jsonl", uri="https://me:the-password@data.example"}]', "data_prep.sources[0].uri"),
    ],
)
def test_no_password_of_a_url_gets_into_a_rendering(override, setting):
    with pytest.raises(UserError, match="the URL holds a password") as refused:
        render(load_run_config(CONFIG, (override,)))
    assert str(refused.value).startswith(f"{setting}: ")
    assert "the-password" not in str(refused.value)


def test_argo_pods_are_restricted():
    spec = TEMPLATE["spec"]
    user = {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000}  # of Argo's own containers too
    assert spec["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}, **user}
    containers = [template for template in spec["templates"] if "container" in template]
    assert len(containers) == len(STEPS) + 1
    for template in containers:
        context = template["container"]["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {mount["mountPath"] for mount in template["container"]["volumeMounts"]} <= {"/tmp", "/dev/shm"}
        assert all("emptyDir" in volume for volume in template["volumes"])


# What Argo's controller makes of a lost pod: phase of the node, exit code of its container ("-1": none), message.
@pytest.mark.parametrize(
    ("status", "code", "message", "again"),
    [
        ("Error", "-1", "pod deleted", True),
        ("Failed", "75", "main: Error (exit code 75)", True),
        ("Failed", "143", "main: Error (exit code 143)", True),
        ("Failed", "137", "Pod was terminated in response to imminent node shutdown.", True),
        ("Failed", "137", "The node was low on resource: memory.", True),
        ("Failed", "-1", "pod failed: neither main nor wait container completed successfully", True),
        ("Failed", "-1", "Pod was rejected: Allocate failed due to no healthy devices present", True),
        ("Failed", "137", "main: OOMKilled (exit code 137)", False),
        ("Failed", "2", "main: Error (exit code 2)", False),
        ("Failed", "1", "main: Error (exit code 1)", False),
    ],
)
def test_argo_retries_what_was_preempted_and_not_what_was_refused(status, code, message, again):
    steps = [template for template in TEMPLATE["spec"]["templates"] if "container" in template]
    [expression] = {template["retryStrategy"]["expression"] for template in steps}
    python = re.sub(r"([\w.]+) contains ('[^']*')", r"\2 in \1", expression)
    for theirs, ours in (("||", "or"), ("&&", "and"), ("!(", "not (")):
        python = python.replace(theirs, ours)
    last = SimpleNamespace(status=status, exitCode=code, message=message)
    assert eval(python, {"lastRetry": last, "asInt": int}) is again


def test_waits_before_retries_do_not_grow_without_end():
    strategies = {one["name"]: one["retryStrategy"] for one in TEMPLATE["spec"]["templates"] if "container" in one}
    for name, strategy in strategies.items():
        # no maxDuration: it counts from the first attempt, hours of training included
        usual = {"duration": "60s", "factor": 2, "cap": "1800s"}
        assert strategy.get("backoff") == (None if name in ("check", "report") else usual)
    config = load_run_config(CONFIG, ("cluster.retries=20",))
    spec = yaml.safe_load(render(config, ("portable",))["portable.yaml"])
    policy = spec["components"]["comp-condition-2"]["dag"]["tasks"]["lora-rl"]["retryPolicy"]
    assert (policy["maxRetryCount"], policy["backoffFactor"]) == (20, 1.0)


def test_kubeflow_goes_on_retrying_after_hours_of_training():
    tasks = KUBEFLOW[0]["components"]["comp-condition-2"]["dag"]["tasks"]
    assert int(tasks["lora-rl"]["retryPolicy"]["backoffMaxDuration"].removesuffix("s")) == 4 * 43_200
    assert tasks["lora-rl"]["retryPolicy"]["maxRetryCount"] == 3


def test_only_steps_with_gpus_are_queued_and_placed_on_gpu_nodes():
    pods = read_argo(TEMPLATE).pods
    queued = {name for name, pod in pods.items() if "kueue.x-k8s.io/queue-name" in pod["labels"]}
    assert queued == {name for name, pod in pods.items() if pod["gpus"]} == {"sft-warmup", "lora-rl", "evaluate"}
    assert queued == {name for name, pod in pods.items() if "nvidia.com/gpu.product" in pod["nodes"]}


def test_each_tick_has_a_run_folder_of_its_own():
    assert CRON["spec"]["workflowSpec"]["workflowTemplateRef"]["name"] == TEMPLATE["metadata"]["name"]
    assert CRON["spec"]["suspend"] is True
    templates = {template["name"]: template for template in TEMPLATE["spec"]["templates"]}
    for name in (CRON["spec"]["workflowSpec"]["entrypoint"], CRON["spec"]["workflowSpec"]["onExit"]):
        [task] = templates[name]["dag"]["tasks"]
        given = {one["name"]: one["value"] for one in task["arguments"]["parameters"]}
        assert given["output_uri"] == "{{workflow.parameters.output_uri}}/{{workflow.name}}"
        assert given["schedule_time"] == "{{workflow.scheduledTime}}"


def test_steps_accept_the_options_they_are_given():
    for template in TEMPLATE["spec"]["templates"]:
        if "container" not in template or template["name"] == "report":
            continue
        package = template["container"]["command"][2]
        step = importlib.import_module(f"{package}.step").STEP
        assert package == f"components.{step.name}"
        parsed = parser_of(step).parse_args(template["container"]["args"])
        assert parsed.node
        assert {name for name in step.inputs if getattr(parsed, name)} == set(step.inputs)


def test_run_folder_of_a_tick_is_refused_where_nobody_fills_in_its_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check = ["--config", config_text(load_run_config(CONFIG)), "--output", "runs/{schedule_time}/check", "--node"]
    assert run_step(CHECK, check) == 2
    assert report(["--run", "runs/{schedule_time}"]) == 2
    assert capsys.readouterr().err.count("{schedule_time} is the time of a schedule's tick, and this run has none") == 2
    assert list(tmp_path.iterdir()) == []


def test_every_parameter_reaches_the_run(tmp_path, monkeypatch):
    """The check step's command line, with each parameter as a console fills it in."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config('data_prep.sources=[{kind="jsonl", uri="elsewhere.jsonl"}]')
    Path("rows.jsonl").write_text("".join(f'{{"prompt": "What follows {n}?", "answer": "7"}}\n' for n in range(9)))
    given = {"config": config_text(config), "base_model": "tiny://qwen2?seed=1", "dataset_uri": "rows.jsonl",
             "updates": "7", "lora_rank": "2", "learning_rate": "0.002", "adapter_name": "other"}  # fmt: skip
    node = {"output_uri": str(tmp_path / "run"), "schedule_time": "2026-01-09T13:00:00Z"}
    assert given.keys() | node.keys() == {one["name"] for one in TEMPLATE["spec"]["arguments"]["parameters"]}
    [check] = [one for one in TEMPLATE["spec"]["templates"] if one["name"] == "check"]
    variables = {f"workflow.parameters.{key}": value for key, value in given.items()}
    variables |= {f"inputs.parameters.{key}": value for key, value in node.items()}
    args = [re.sub(r"\{\{(.*?)\}\}", lambda found: variables[found[1]], text) for text in check["container"]["args"]]
    assert run_step(CHECK, args) == 0
    resolved = load_run_config("run/config.json")
    assert (resolved.model.uri, resolved.data_prep.sources[0].uri) == ("tiny://qwen2?seed=1", "rows.jsonl")
    assert (resolved.lora_rl.updates, resolved.lora.rank, resolved.lora_rl.optimizer.learning_rate) == (7, 2, 0.002)
    assert resolved.promote.adapter_name == "other"


def test_run_without_output_uri_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    check = ["--config", config_text(load_run_config(CONFIG)), "--output", "/check", "--node"]
    assert run_step(CHECK, check) == 2
    assert report(["--run", ""]) == 2
    with pytest.raises(SystemExit, match="2"):
        run_in_pipeline("check", config=config_text(load_run_config(CONFIG)), output_uri="")
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert all(line.startswith("error: output_uri: is empty") for line in errors)
    assert list(tmp_path.iterdir()) == []


def test_where_a_run_is_placed_changes_no_fingerprint():
    here = load_run_config(CONFIG)
    there = load_run_config(CONFIG, ("cluster.namespace=other", "cluster.steps.lora_rl.gpus=4", "cluster.queue="))
    for name in STEPS:
        step = importlib.import_module(f"components.{name}.step").STEP
        assert "cluster" not in step.sections
        assert fingerprint_from(step, here, {}) == fingerprint_from(step, there, {}), name


@pytest.mark.parametrize(
    ("overrides", "store"),
    [
        (
            (),
            {
                "endpoint": "minio.minio:9000",
                "insecure": True,
                "region": "us-east-1",
                "accessKeySecret": {"name": "tuneloop-s3", "key": "AWS_ACCESS_KEY_ID"},
                "secretKeySecret": {"name": "tuneloop-s3", "key": "AWS_SECRET_ACCESS_KEY"},
            },
        ),
        (
            ("cluster.secrets=[]", "cluster.env={}"),
            {"endpoint": "s3.amazonaws.com", "insecure": False, "useSDKCreds": True},
        ),
        (
            (f"cluster.secrets=[{', '.join(SECRET % (key, 'false') for key in KEYS)}]", "cluster.env={}"),
            {
                "endpoint": "s3.amazonaws.com",
                "insecure": False,
                "accessKeySecret": {"name": "s3", "key": "AWS_ACCESS_KEY_ID"},
                "secretKeySecret": {"name": "s3", "key": "AWS_SECRET_ACCESS_KEY"},
                "sessionTokenSecret": {"name": "s3", "key": "AWS_SESSION_TOKEN"},
            },
        ),
        (
            (f"cluster.secrets=[{', '.join(SECRET % (key, 'true') for key in KEYS)}]", "cluster.env={}"),
            {"endpoint": "s3.amazonaws.com", "insecure": False, "useSDKCreds": True},
        ),
    ],
)
def test_report_is_stored_as_the_steps_store(overrides, store):
    artifact = report_artifact(load_run_config(CONFIG, overrides), "/tmp/report.html")
    assert {key: value for key, value in artifact["s3"].items() if key not in ("bucket", "key")} == store
