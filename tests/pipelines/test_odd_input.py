"""What people mistype, and disks that are full: one line that says what to change, and nothing lost or half-made."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from components.data_prep.step import STEP
from components.parameters import resolve_parameters
from components.step_command import main as step_main
from pipelines import runs
from pipelines.cli import main
from tests.tiny_run import tiny_config, tiny_toml
from tuneloop.config import resolved_json
from tuneloop.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a config in it."""
    monkeypatch.chdir(tmp_path)
    tiny_toml(tmp_path)
    return tmp_path


def on_a_full_disk(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line where no file can grow."""

    def no_byte_more() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-m", "pipelines", *arguments], preexec_fn=no_byte_more, env=environment,
                          capture_output=True, text=True)  # fmt: skip


def test_config_of_a_run_outlives_a_full_disk(here):
    folder = runs.create_run(tiny_config(), "runs", "one")
    before = (folder / "config.json").read_bytes()
    done = on_a_full_disk("run", "--resume", "one", "--set", "lora_rl.updates=3")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "free space" in done.stderr
    assert (folder / "config.json").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_no_run_is_begun_on_a_full_disk(here):
    done = on_a_full_disk("run", "--config", "tiny.toml", "--run", "one")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--output runs: cannot be written" in done.stderr
    assert list((here / "runs").iterdir()) == []


def test_two_runs_of_one_name_are_none(here):
    with pytest.raises(UserError, match="--run x: is named twice"), runs.create_runs([tiny_config()] * 2, "runs", "xx"):
        pass
    assert not (here / "runs").exists()


def test_a_report_that_cannot_be_written_is_one_line(here, capsys):
    folder = runs.create_run(tiny_config(), "runs", "one")
    (folder / "report").write_text("in the way")
    assert main(["report", "one"]) == 2
    assert "the report cannot be written (" in capsys.readouterr().err


def test_a_failed_run_says_why_though_its_report_cannot_be_written(here, capsys):
    folder = runs.create_run(tiny_config(), "runs", "one")
    (folder / "report").write_text("in the way")
    (folder / "check").mkdir()  # no step made it
    assert main(["run", "--resume", "one"]) == 2
    told = capsys.readouterr()
    assert "no report: " in told.out
    assert "continue with: python -m pipelines run --resume " in told.out
    assert "error: check: " in told.err


def test_a_report_is_copied_where_one_wants_it(here, capsys):
    runs.create_run(tiny_config(), "runs", "one")
    assert main(["report", "one", "--to", "mine.html"]) == 0
    assert (here / "mine.html").read_text().startswith("<!doctype html>")
    assert main(["report", "one", "--to", "nowhere/mine.html"]) == 2
    assert "--to nowhere/mine.html: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["run", "--config", "tiny.toml", "--output", "s3://"], "names no bucket; write s3://bucket/prefix"),
        (["compile", "--output", "s3://bucket/x"], "s3://bucket/x: only local paths"),
        (["compile", "--config", "tiny.toml", "--output", "out", "--set", "promote.registry=s3://models/registry",
          "--set", 'cluster.schedule={runs_uri="s3://models/runs", schedules=["61 3 * * *"]}'], "'61' is no minute"),
        (["config", "--config", "tiny.toml", "--set", 'cluster.schedule={runs_uri="s3://b", schedules=["² * * * *"]}'],
         "'²' is no minute"),
        (["config", "--config", "deep.json"], "deep.json: not valid JSON"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(here, capsys, arguments, fragment):
    (here / "deep.json").write_text("[" * 100_000)
    before = sorted(here.rglob("*"))
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert fragment in told
    assert told.startswith("error: ")
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("gigabytes", ["nan", "inf", "-5", "much"])
def test_memory_is_a_number_of_gigabytes(here, capsys, gigabytes):
    with pytest.raises(SystemExit) as left:
        main(["plan", "--config", "tiny.toml", f"--host-memory={gigabytes}"])
    assert left.value.code == 2
    assert f"'{gigabytes}' is no number of gigabytes" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["s3://", "s3:", "", "/", "."])
def test_an_output_that_is_no_folder_of_its_own(here, capsys, output):
    assert step_main(STEP, ["--config", "tiny.toml", "--output", output]) == 2
    told = capsys.readouterr().err
    assert "names no bucket" in told or "names no folder" in told
    assert [path.name for path in here.iterdir()] == ["tiny.toml"]


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"<<<<<<< ours\n"])
def test_a_damaged_rendering_is_not_what_the_pipeline_compiles_to(here, capsys, content):
    (here / "kubernetes.yaml").write_bytes(content)
    assert main(["compile", "--check", "--target", "kubernetes", "--output", "."]) == 2
    assert "kubernetes.yaml is not what the pipeline compiles to" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_setting(here, capsys):
    (here / "tiny.toml").write_bytes(b"\xef\xbb\xbf" + (here / "tiny.toml").read_bytes())
    assert main(["config", "--config", "tiny.toml"]) == 0


def test_a_reader_that_has_seen_enough_is_no_error():
    command = f"{sys.executable} -m pipelines config --schema | head -1"
    done = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{\n", "")


def test_a_parameter_may_hold_any_character():
    config = resolve_parameters(resolved_json(tiny_config()), {"base_model": "s3://b/𠮷/m"})
    assert config.model.uri == "s3://b/𠮷/m"
    assert json.loads(resolved_json(config))["model"]["uri"] == "s3://b/𠮷/m"
