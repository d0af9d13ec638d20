"""Each step's image holds what the step needs: those of the base image run where torch and its like cannot be imported."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.images import BASE_IMAGE, TRAIN_IMAGE
from images.smoke import INPUTS, WITHOUT_TORCH
from tests.components.test_promote import DEMO, run_outputs
from tuneloop.errors import UserError
from tuneloop.models.adapter_files import file_digest
from tuneloop.models.adapter_io import load_adapter

REPOSITORY = Path(__file__).resolve().parents[2]
BASE_STEPS = ("check", "data_prep", "promote", "report")
TRAIN_STEPS = ("sft_warmup", "lora_rl", "merge_adapter", "evaluate")
NOT_IN_BASE = ("torch", "peft", "gguf", "scipy", "tensorboard", "deepspeed", "vllm", "lm_eval", "mlflow", "wandb")


def image(step: str) -> str:
    component = getattr(importlib.import_module(f"components.{step}.component"), step)
    return component.component_spec.implementation.container.image


@pytest.fixture
def base_environment(tmp_path: Path) -> dict[str, str]:
    """For a Python that has what the base image has; None in sys.modules hides a package, from find_spec too."""
    hidden = f"import sys\nsys.modules.update(dict.fromkeys({NOT_IN_BASE}))\n"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(hidden)
    path = os.pathsep.join([str(tmp_path / "site"), str(REPOSITORY)])
    return {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path), "TUNELOOP_CACHE": str(tmp_path / "cache")}


def run(environment: dict[str, str], *arguments: str) -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_step_names_its_image():
    assert {step: image(step) for step in BASE_STEPS} == dict.fromkeys(BASE_STEPS, BASE_IMAGE)
    assert {step: image(step) for step in TRAIN_STEPS} == dict.fromkeys(TRAIN_STEPS, TRAIN_IMAGE)
    steps = {folder.parent.name for folder in (REPOSITORY / "components").glob("*/component.py")}
    assert steps == {*BASE_STEPS, *TRAIN_STEPS}
    assert set(WITHOUT_TORCH) <= set(BASE_STEPS)
    assert set(INPUTS) == {*WITHOUT_TORCH, *TRAIN_STEPS}


def test_the_environment_has_no_torch(base_environment):
    code = "import importlib.util; print(importlib.util.find_spec('torch'))"
    assert run(base_environment, "-c", code).strip() == "None"


def test_check_and_data_prep_run_without_torch(base_environment):
    printed = run(base_environment, "-m", "images.smoke")
    assert "smoke: check ran" in printed
    assert "smoke: data_prep ran" in printed
    assert "smoke: sft_warmup" not in printed


def test_promote_and_report_run_without_torch(base_environment, tmp_path):
    folder = tmp_path / "run"
    inputs = [f"--{name}={place}" for name, place in run_outputs(folder, seed=1).items()]
    registry = f"--set=promote.registry='{tmp_path / 'registry'}'"
    printed = run(base_environment, "-m", "components.promote", f"--config={DEMO}", registry,
                  f"--output={folder / 'promote'}", *inputs)  # fmt: skip
    assert "promoted:" in printed
    run(base_environment, "-m", "components.report", f"--run={folder}")
    assert (folder / "report" / "report.html").is_file()


def test_a_model_that_torch_makes_is_refused_in_one_line(base_environment, tmp_path):
    command = [sys.executable, "-m", "components.check", f"--config={DEMO}", f"--output={tmp_path / 'check'}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=base_environment, capture_output=True, text=True)
    assert done.returncode == UserError.exit_code
    assert "torch, which is not installed here; store the model's folder in a bucket" in done.stderr


@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"up_proj": 7.0}}],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_the_digest_without_torch_is_the_adapter_s_own(tmp_path, changes, dtype):
    import dataclasses

    import torch

    from tuneloop.models.adapter_io import save_adapter

    run_outputs(tmp_path, seed=2)
    adapter = load_adapter(tmp_path / "lora_rl" / "adapter")
    factors = {name: tuple(part.to(getattr(torch, dtype)) for part in pair) for name, pair in adapter.factors.items()}
    adapter = dataclasses.replace(adapter, factors=factors, config={**adapter.config, **changes})
    save_adapter(adapter, tmp_path / "adapter")
    assert file_digest(tmp_path / "adapter") == adapter.digest()
