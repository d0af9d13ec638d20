"""`python -m pipelines compile`: the renderings that are checked in, and what the command refuses."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys

import pytest
import yaml

from components.config import RunConfig, load_run_config
from components.images import TRAIN_IMAGE
from pipelines import compile as compiling
from pipelines.cli import main
from pipelines.compile import COMPILED, CONFIG, check_compiled, compile_pipeline, render
from pipelines.kfp_rendering import package_digest
from tuneloop.errors import UserError


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_run_config(CONFIG)


def test_checked_in_renderings_are_current(config):
    check_compiled(config)
    assert {path.name for path in COMPILED.iterdir()} == set(render(config))


@pytest.mark.parametrize("file", sorted(path.name for path in COMPILED.iterdir()))
def test_each_stale_rendering_is_found(config, file, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "render", lambda *_: {path.name: path.read_text() for path in COMPILED.iterdir()})
    shutil.copytree(COMPILED, tmp_path, dirs_exist_ok=True)
    check_compiled(config, tmp_path)
    path = tmp_path / file
    text = path.read_text()
    for stale in (text.replace("tuneloop", "other"), text.replace("workflow", "other"), None):
        path.unlink() if stale is None else path.write_text(stale)
        if stale != text:
            with pytest.raises(UserError, match=f"{file} is not what the pipeline compiles to"):
                check_compiled(config, tmp_path)


def test_other_sdk_version_is_no_difference_and_another_image_is(config, tmp_path):
    [path] = compile_pipeline(config, tmp_path, ("kubernetes",))
    text = path.read_text()
    path.write_text(text.replace("sdkVersion: kfp-", "sdkVersion: kfp-9."))
    check_compiled(config, tmp_path, ("kubernetes",))
    path.write_text(text.replace(TRAIN_IMAGE, "tuneloop/train:old"))
    with pytest.raises(UserError, match="python -m pipelines compile"):
        check_compiled(config, tmp_path, ("kubernetes",))


def test_digest_is_of_what_a_package_says(config):
    text = render(config, ("kubernetes",))["kubernetes.yaml"]
    documents = yaml.load_all(text, Loader=yaml.CSafeLoader)
    written_otherwise = yaml.dump_all(documents, Dumper=yaml.CSafeDumper, indent=4).replace("kfp-2", "kfp-3")
    assert package_digest(written_otherwise) == package_digest(text)
    assert package_digest(text.replace(TRAIN_IMAGE, "tuneloop/train:old")) != package_digest(text)


def test_compiles_in_under_five_seconds(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "pipelines", "compile", "--target", "kubernetes", "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=CONFIG.parent.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_compiling_needs_no_torch(tmp_path):
    code = "import sys; from pipelines.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "compile", "--target", "argo", "--output", str(tmp_path)]
    subprocess.run(command, check=True, cwd=CONFIG.parent.parent)


def test_one_target_writes_its_files_alone(tmp_path, capsys):
    assert main(["compile", "--target", "argo", "--output", str(tmp_path)]) == 0
    files = {"workflow_template.yaml", "cron_workflow.yaml", "kustomization.yaml"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert capsys.readouterr().out.count("wrote ") == 3
    assert main(["compile", "--target", "argo", "--output", str(tmp_path), "--check"]) == 0
    (tmp_path / "cron_workflow.yaml").unlink()
    assert main(["compile", "--target", "argo", "--output", str(tmp_path), "--check"]) == 2


def test_without_a_schedule_there_is_no_cron_workflow(config, tmp_path):
    unscheduled = config.model_copy(update={"cluster": config.cluster.model_copy(update={"schedule": None})})
    assert compiling.CRON_WORKFLOW not in render(unscheduled, ("argo",))
    assert compiling.CRON_WORKFLOW not in render(unscheduled, ("argo",))[compiling.KUSTOMIZATION]
    for one in (config, unscheduled):  # the schedule was taken out of the config
        compile_pipeline(one, tmp_path, ("argo",))
    assert {path.name for path in tmp_path.iterdir()} == {compiling.WORKFLOW_TEMPLATE, compiling.KUSTOMIZATION}


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--set", "promote.registry=registry"], "promote.registry = registry: is a folder"),
        (["--set", "check.gpu=rtx4090-24gb"], "check.gpu = 'rtx4090-24gb': sft_warmup asks for a GPU, and Vertex has"),
        (["--set", "cluster.base_image=tuneloop/base:latest"], "cluster.base_image: the tag latest"),
        (["--target", "nomad"], "argument --target: invalid choice: 'nomad'"),
    ],
)
def test_refused_in_one_line_and_nothing_is_written(options, line, tmp_path, capsys):
    with pytest.raises(SystemExit) if "nomad" in options else contextlib.nullcontext():
        assert main(["compile", *options, "--output", str(tmp_path / "new")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert line in message
    assert not (tmp_path / "new").exists()


def test_an_image_from_the_environment_is_refused_in_one_line():
    command = [sys.executable, "-m", "pipelines", "config", "--config", "configs/demo.toml"]
    environment = {**os.environ, "TUNELOOP_BASE_IMAGE": "registry/base:latest"}
    done = subprocess.run(command, cwd=CONFIG.parent.parent, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "base_image: the tag latest may be another image tomorrow" in done.stderr


def test_checked_in_folder_is_of_one_config_only(capsys):
    assert main(["compile", "--config", "configs/demo.toml"]) == 2
    assert "--output: pipelines/compiled is of configs/cluster.toml alone" in capsys.readouterr().err
