"""`[cluster]`: what Kubernetes would refuse is refused here, in one line; and what follows from a config."""

import pytest

from components.cluster_config import ClusterConfig
from components.config import load_run_config
from pipelines.compile import CONFIG
from pipelines.placement import object_name, place
from tests.tiny_run import tiny_config
from tuneloop.config import parse_config
from tuneloop.errors import UserError


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"namespace": "Team_A"}, "namespace: "),
        ({"base_image": "tuneloop/base"}, "base_image: an image is named with a tag or digest"),
        ({"base_image": "tuneloop/base:latest"}, "base_image: the tag latest may be another image tomorrow"),
        ({"train_image": "registry:5000/tuneloop"}, "train_image: an image is named with a tag or digest"),
        ({"train_image": "a/b@sha256:12"}, "train_image: an image is named with a tag or digest"),
        ({"queue": "a queue"}, "queue: "),
        ({"gpu_resource": "nvidia.com/gpu/0"}, "gpu_resource: "),
        ({"node_selector": {"-x": "y"}}, "node_selector.-x.[key]: "),
        ({"node_selector": {"x": "a b"}}, "node_selector.x: "),
        ({"shm": "8 GB"}, "shm: "),
        ({"steps": {"lora_rl": {"memory": "0Gi"}}}, "steps.lora_rl.memory: "),
        ({"steps": {"lora_rl": {"memory": "64g"}}}, "steps.lora_rl.memory: "),
        ({"steps": {"lora_rl": {"cpu": "0"}}}, "steps.lora_rl.cpu: "),
        ({"steps": {"lora_rl": {"gpus": -1}}}, "steps.lora_rl.gpus: "),
        ({"steps": {"lora": {}}}, "steps.lora: unknown key; did you mean 'lora_rl'?"),
        ({"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}, 'operator = "Exists" takes no value'),
        ({"tolerations": [{"value": "b"}]}, 'without a key, operator is "Exists"'),
        ({"tolerations": [{"key": "a", "seconds": 5}]}, 'seconds are of effect = "NoExecute" only'),
        ({"secrets": [{"secret": "S3", "key": "K"}]}, "secrets.0.secret: "),
        ({"secrets": [{"secret": "s3", "key": "s3.key"}]}, "key 's3.key' is no name of a variable: name one in env"),
        ({"secrets": [{"secret": "a", "key": "K"}], "env": {"K": "v"}}, "the variable K is given twice"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "v"}}, "env.AWS_SECRET_ACCESS_KEY: looks like a credential"),
        ({"env": {"AWS_ACCESS_KEY_ID": "v"}}, "env.AWS_ACCESS_KEY_ID: looks like a credential"),
        ({"env": {"HF_TOKEN": "v"}}, "env.HF_TOKEN: looks like a credential"),
        ({"env": {"MLFLOW_TRACKING_URI": "https://me:word@host"}}, "the URL holds a password"),
        ({"env": {"2X": "v"}}, "env.2X.[key]: "),
        ({"schedule": {"runs_uri": "runs"}}, "schedule.runs_uri: "),
        ({"schedule": {"runs_uri": "s3://b/runs", "schedules": ["0 0 3 * * *"]}}, "schedule.schedules.0: "),
        ({"schedule": {"runs_uri": "s3://b/runs", "schedules": []}}, "schedule.schedules: "),
    ],
)
def test_refused_in_one_line(given, line):
    with pytest.raises(UserError) as caught:
        parse_config(ClusterConfig, given, origin="cluster.toml")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"base_image": f"registry.local:5000/team/base@sha256:{'0' * 64}"},
        {"base_image": f"registry.local:5000/team/base:latest@sha256:{'0' * 64}"},
        {
            "env": {
                "TOKENIZERS_PARALLELISM": "false",
                "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
                "A": "http://b:1",
            }
        },
        {"secrets": [{"secret": "s3", "key": "s3.key", "env": "KEY"}], "service_account": "", "queue": ""},
        {"tolerations": [{"operator": "Exists", "effect": "NoExecute", "seconds": 60}]},
        {"steps": {"check": {"cpu": "500m", "memory": "512Mi"}, "data_prep": {"cpu": "1.5"}}},
        {"schedule": {"runs_uri": "s3://b", "schedules": ["*/10 3-5 * * MON", "0 0 1 1 *"], "timezone": "Europe/Rome"}},
    ],
)
def test_accepted_and_read_back(given):
    config = parse_config(ClusterConfig, given, origin="cluster.toml")
    assert parse_config(ClusterConfig, config.model_dump(mode="json"), origin="json") == config


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ((), {}),
        (("check.gpu=h100-80gb",), {"sft_warmup": 1, "lora_rl": 1, "evaluate": 1}),
        (("check.gpu=h100-80gb", "check.gpus=8"), {"sft_warmup": 1, "lora_rl": 8, "evaluate": 1}),
        (
            ("check.gpu=h100-80gb", 'evaluate.engine={kind="vllm", tensor_parallel_size=4}'),
            {"sft_warmup": 1, "lora_rl": 1, "evaluate": 4},
        ),
        (("cluster.steps.lora_rl.gpus=2",), {"lora_rl": 2}),
        (("check.gpu=h100-80gb", "cluster.steps.evaluate.gpus=0"), {"sft_warmup": 1, "lora_rl": 1}),
    ],
)
def test_gpus_follow_from_the_run(overrides, gpus):
    config = tiny_config(*overrides)
    placed = {step: place(config, step, "i:1") for step in type(config.cluster.steps).model_fields}
    assert {step: one.gpus for step, one in placed.items() if one.gpus} == gpus
    assert {step for step, one in placed.items() if one.tolerations} == set(gpus)


def test_resources_of_one_step_leave_its_other_ones():
    config = tiny_config("cluster.steps.lora_rl.memory=200Gi")
    placement = place(config, "lora_rl", "i:1")
    assert (placement.cpu, placement.memory, placement.timeout_seconds) == ("8", "200Gi", 72 * 3600)


def test_secrets_go_to_the_steps_that_are_named():
    config = load_run_config(CONFIG)
    having = {
        step
        for step in type(config.cluster.steps).model_fields
        if "WANDB_API_KEY" in {secret.variable for secret in place(config, step, "i:1").secrets}
    }
    assert having == {"sft_warmup", "lora_rl"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("qwen2.5_7b", "tuneloop-qwen2-5-7b"), ("a..b-", "tuneloop-a-b"), ("x" * 63, "tuneloop-" + "x" * 33 + "-")],
)
def test_names_of_objects_are_kubernetes_names(name, expected):
    found = object_name(tiny_config(f"name={name}"))
    assert found.startswith(expected)
    assert len(found) <= 52 - 3  # Argo takes no longer name of a CronWorkflow than 52


def test_an_object_keeps_its_name_when_the_config_changes():
    found = {object_name(tiny_config(f"name={'x' * 63}", f"lora_rl.updates={updates}")) for updates in (2, 3)}
    assert len(found) == 1
    assert found != {object_name(tiny_config(f"name={'x' * 62}y"))}
