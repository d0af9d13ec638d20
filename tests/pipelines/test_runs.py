"""Run folders: unique names, locks, and what resuming keeps."""

import importlib

import pytest

from components.runner import execute
from pipelines import runs
from pipelines.steps import STEPS
from tests.tiny_run import tiny_config
from tuneloop.errors import UserError


def finished(folder, config, *names):
    """Run the named steps for real into the run folder."""
    for name in names:
        step = importlib.import_module(f"components.{name}.step").STEP
        inputs = {key: str(folder / source) for key, source in STEPS[name].items()}
        execute(step, config, inputs, str(folder / name))


def test_runs_of_the_same_second_do_not_collide(tmp_path):
    folders = {runs.create_run(tiny_config(), str(tmp_path)) for _ in range(5)}
    assert len(folders) == 5
    assert all((folder / "config.json").is_file() for folder in folders)


@pytest.mark.parametrize("name", ["../x", "", "a/b", ".hidden", "x" * 200])
def test_names_that_are_no_folder_names(tmp_path, name):
    with pytest.raises(UserError, match="--run"):
        runs.create_run(tiny_config(), str(tmp_path), name)
    assert list(tmp_path.iterdir()) == []


def test_taken_name_says_how_to_continue(tmp_path):
    runs.create_run(tiny_config(), str(tmp_path), "one")
    with pytest.raises(UserError, match="--resume"):
        runs.create_run(tiny_config(), str(tmp_path), "one")


def test_run_is_found_by_path_and_by_name(tmp_path):
    folder = runs.create_run(tiny_config(), str(tmp_path), "one")
    assert runs.find_run("one", str(tmp_path)) == runs.find_run(str(folder), "elsewhere") == folder
    with pytest.raises(UserError, match=r"runs in .*: one"):
        runs.find_run("two", str(tmp_path))


def test_second_run_on_a_folder_is_refused(tmp_path):
    with (
        runs.run_lock(tmp_path),
        pytest.raises(UserError, match="another run is writing it"),
        runs.run_lock(tmp_path),
    ):
        pass
    with runs.run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_changed_settings_must_leave_finished_steps_alone(tmp_path):
    config = tiny_config()
    folder = runs.create_run(config, str(tmp_path), "one")
    finished(folder, config, "check", "data_prep")
    resumed = runs.resume_config(folder, ("lora_rl.updates=9",), None)
    assert resumed.lora_rl.updates == 9
    with pytest.raises(UserError, match="add --from data_prep"):
        runs.resume_config(folder, ("data_prep.test_share=0.3",), None)
    with pytest.raises(UserError, match="add --from data_prep"):
        runs.resume_config(folder, ("data_prep.test_share=0.3",), "lora_rl")
    assert runs.resume_config(folder, ("data_prep.test_share=0.3",), "data_prep").data_prep.test_share == 0.3


def test_clear_removes_the_step_and_all_later_ones(tmp_path):
    config = tiny_config()
    folder = runs.create_run(config, str(tmp_path), "one")
    for name in ("check", "data_prep", "sft_warmup", "lora_rl.partial", "report"):
        (folder / name).mkdir()
    (folder / "lora_rl.failed.json").write_text("{}")
    assert runs.clear(folder, None, config) == []
    removed = runs.clear(folder, "sft_warmup", config)
    assert [path.name for path in removed] == ["sft_warmup", "lora_rl.partial", "lora_rl.failed.json", "report"]
    assert sorted(path.name for path in folder.iterdir()) == ["check", "config.json", "data_prep"]


def test_changed_config_repeats_the_check_and_is_recorded(tmp_path):
    folder = runs.create_run(tiny_config(), str(tmp_path), "one")
    (folder / "check").mkdir()
    changed = tiny_config("lora_rl.updates=9")
    assert [path.name for path in runs.clear(folder, None, changed)] == ["check"]
    assert runs.resume_config(folder, (), None) == changed
