"""The checked-in renderings: one pipeline for every backend, valid for each, and nothing that must not be there."""

import importlib
import json
import re
from collections.abc import Iterator
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

KUBEFLOW = documents("kubernetes.yaml")
PORTABLE = documents("portable.yaml")
[TEMPLATE] = documents("workflow_template.yaml")
[CRON] = documents("cron_workflow.yaml")
GITOPS = documents("gitops.yaml")


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
    for forbidden in ("hostPath", "hostNetwork", "hostPID", "hostIPC", "privileged", "kind: Secret", "stringData"):
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


def test_argo_retries_what_was_preempted_and_not_what_was_refused():
    for template in TEMPLATE["spec"]["templates"]:
        if template["name"] in ("check", "report") or "container" not in template:
            assert "retryStrategy" not in template
            continue
        strategy = template["retryStrategy"]
        assert strategy["expression"] == "lastRetry.status == 'Error' || asInt(lastRetry.exitCode) in [75, 143]"
        assert "maxDuration" not in strategy["backoff"]  # it counts from the first attempt, hours of training included


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
    ],
)
def test_report_is_stored_as_the_steps_store(overrides, store):
    artifact = report_artifact(load_run_config(CONFIG, overrides), "/tmp/report.html")
    assert {key: value for key, value in artifact["s3"].items() if key not in ("bucket", "key")} == store
