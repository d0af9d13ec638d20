"""Each step's metadata.yaml says what the code does: inputs, output, what its pod asks for."""

from importlib import import_module
from pathlib import Path

import pytest
import yaml

from components.config import load_run_config
from pipelines.placement import place
from pipelines.steps import STEPS

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = sorted(path.parent.name for path in (REPOSITORY / "components").glob("*/metadata.yaml"))


def metadata(step: str) -> dict:
    return yaml.safe_load((REPOSITORY / "components" / step / "metadata.yaml").read_text())


def test_every_step_has_metadata():
    assert set(NAMES) == {*STEPS, "report"}


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"report"}))
def test_inputs_and_output_are_the_step_s(name):
    step, found = import_module(f"components.{name}.step").STEP, metadata(name)
    assert (found["name"], [output["name"] for output in found["outputs"]]) == (step.name, [step.name])
    assert tuple(one["name"] for one in found["inputs"]) == step.inputs
    assert tuple(one["name"] for one in found["inputs"] if one.get("optional")) == step.optional_inputs


@pytest.mark.parametrize("name", NAMES)
def test_resources_are_what_a_pod_asks_for(name):
    placed = place(load_run_config(REPOSITORY / "configs" / "qwen2.5-0.5b-1gpu.toml"), name, "tuneloop/any:0.1.0")
    asked = {"cpu": placed.cpu, "memory": placed.memory, "gpu": str(placed.gpus)}
    assert metadata(name)["resources"] == asked
