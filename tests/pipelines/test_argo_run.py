"""What the Argo rendering says is run: real steps, against an S3 endpoint, in the order and on the conditions it gives.

The interpreter below stands in for Argo's controller, which needs a cluster. It knows what the rendering uses: DAGs,
dependencies, `when`, variables, output parameters from files, and the exit handler; expressions it does not evaluate.
"""

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.report.step import main as report
from components.step_command import main as run_step
from pipelines.argo.objects import workflow
from pipelines.compile import WORKFLOW_TEMPLATE, compile_pipeline
from pipelines.steps import STEPS
from tests.s3_server import BUCKET, s3_server  # noqa: F401 - a fixture
from tests.tiny_run import tiny_config

# What the tiny model can learn from scratch in a few updates: to say 7 whatever it is asked.
ROWS = "".join(json.dumps({"prompt": f"What follows {n}?", "answer": "7"}) + "\n" for n in range(200))
SETTINGS = (
    f'data_prep.sources=[{{kind="jsonl", uri="s3://{BUCKET}/elsewhere.jsonl"}}]',
    "data_prep.test_share=0.15",
    "sft_warmup.updates=20",
    "sft_warmup.optimizer.learning_rate=0.01",
    "sft_warmup.optimizer.warmup_updates=1",
    "lora_rl.updates=3",
    "task.max_new_tokens=2",
    f"promote.registry=s3://{BUCKET}/registry",
    "retrain.skip_unchanged=true",
)


class Interpreter:
    """Runs one Workflow of a WorkflowTemplate; `ran` holds the names of the steps that ran, in their order."""

    def __init__(self, template: dict[str, Any], submitted: dict[str, Any], scratch: Path):
        assert submitted["spec"]["workflowTemplateRef"]["name"] == template["metadata"]["name"]
        self.spec = template["spec"]
        self.templates = {one["name"]: one for one in self.spec["templates"]}
        given = [*self.spec["arguments"]["parameters"], *submitted["spec"]["arguments"]["parameters"]]
        self.variables = {f"workflow.parameters.{one['name']}": one["value"] for one in given}
        self.variables["workflow.name"] = submitted["metadata"]["name"]
        self.outputs = scratch / "outputs"
        self.ran: list[str] = []

    def run(self) -> None:
        for name in (self.spec["entrypoint"], self.spec["onExit"]):
            self._template(self.templates[name], {})

    def _template(self, template: dict[str, Any], inputs: dict[str, str]) -> dict[str, str]:
        variables = self.variables | {f"inputs.parameters.{name}": value for name, value in inputs.items()}
        if "container" in template:
            return self._container(template, variables)
        waiting = {task["name"]: task for task in template["dag"]["tasks"]}
        while waiting:
            name = next(n for n, one in waiting.items() if not set(one.get("dependencies", ())) & set(waiting))
            task = waiting.pop(name)
            when = _filled(task.get("when", "true == true"), variables)
            left, right = when.split(" == ")
            if left == right:
                arguments = {one["name"]: _filled(one["value"], variables) for one in task["arguments"]["parameters"]}
                outputs = self._template(self.templates[task["template"]], arguments)
                variables |= {f"tasks.{name}.outputs.parameters.{key}": value for key, value in outputs.items()}
        return {}

    def _container(self, template: dict[str, Any], variables: dict[str, str]) -> dict[str, str]:
        shutil.rmtree(self.outputs, ignore_errors=True)  # a pod's own volume
        container = template["container"]
        args = [_filled(text, variables).replace("/tmp/outputs", str(self.outputs)) for text in container["args"]]
        step = container["command"][2].removeprefix("components.")
        self.ran.append(step)
        if step == "report":
            assert report(args) == 0
        else:
            assert run_step(importlib.import_module(f"components.{step}.step").STEP, args) == 0, step
        declared = template.get("outputs", {}).get("parameters", ())
        files = {one["name"]: one["valueFrom"]["path"].replace("/tmp/outputs", str(self.outputs)) for one in declared}
        return {name: Path(file).read_text() for name, file in files.items()}


def _filled(text: str, variables: dict[str, str]) -> str:
    text = re.sub(r"\{\{=.*?\}\}", "", text)
    return re.sub(r"\{\{([^{}]+)\}\}", lambda match: variables[match[1]], text)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compiled")
    compile_pipeline(tiny_config(*SETTINGS), folder, ("argo",))
    return yaml.safe_load((folder / WORKFLOW_TEMPLATE).read_text())


def run(template: dict[str, Any], scratch: Path, name: str) -> Interpreter:
    """Start a run as a user does who gives a data set and an output, nothing else."""
    given = {"dataset_uri": f"s3://{BUCKET}/rows.jsonl", "output_uri": f"s3://{BUCKET}/runs/{name}"}
    interpreter = Interpreter(template, workflow(tiny_config(*SETTINGS), name, given), scratch)
    interpreter.run()
    return interpreter


def test_a_run_is_promoted_and_with_the_same_data_nothing_is_trained(template, s3_server, tmp_path):  # noqa: F811
    client = s3_server.client()
    client.put_object(Bucket=BUCKET, Key="rows.jsonl", Body=ROWS.encode())
    first = run(template, tmp_path, "first")
    assert first.ran == [*STEPS, "report"]
    page = client.get_object(Bucket=BUCKET, Key="runs/first/report/report.html")["Body"].read()
    assert (first.outputs / "report.html").read_bytes() == page
    second = run(template, tmp_path, "second")
    assert second.ran == ["check", "data_prep", "report"]
