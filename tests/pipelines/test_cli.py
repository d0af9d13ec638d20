"""The command line as a user meets it, mostly in processes of its own."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import main
from tests.tiny_run import tiny_toml

REPOSITORY = Path(__file__).resolve().parents[2]


def pipelines(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "pipelines", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"], ["run", "--help"], ["submit", "--help"], ["config", "--config", "configs/demo.toml"],
        ["submit", "--config", "configs/demo.toml", "--output", "runs"],
    ],
)  # fmt: skip
def test_help_and_validation_import_neither_torch_nor_kfp(arguments):
    code = (
        "import sys\nfrom pipelines.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "sys.exit(bool({'torch', 'kfp', 'transformers'} & set(sys.modules)))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, cwd=REPOSITORY)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # CPU time: other work on the machine is not ours to measure
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_config_prints_what_it_reads_back(tmp_path, capsys):
    assert main(["config", "--config", "configs/demo.toml", "--set", "seed=5"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "resolved.json").write_text(printed)
    assert main(["config", "--config", str(tmp_path / "resolved.json")]) == 0
    assert capsys.readouterr().out == printed
    assert json.loads(printed)["seed"] == 5
    assert main(["config", "--schema"]) == 0
    assert "lora_rl" in json.loads(capsys.readouterr().out)["properties"]


def test_compile_check(capsys):
    assert main(["compile", "--check"]) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["run"], "--config --resume"),
        (["run", "--conf", "x"], "--config"),
        (["run", "--config", "no.toml"], "no.toml: no such config file"),
        (["run", "--config", "configs/demo.toml", "--set", "seed"], "write it as section.key=value"),
        (["run", "--config", "configs/demo.toml", "--from", "evaluate"], "add --resume RUN"),
        (["run", "--config", "configs/demo.toml", "--from", "nowhere"], "invalid choice: 'nowhere'"),
        (["run", "--resume", "none"], "none: no such run"),
        (["run", "--resume", "none", "--run", "x"], "drop one"),
        (["run", "--config", "configs/demo.toml", "--run", "a/b"], "--run 'a/b'"),
        (["report", "none"], "none: no such run"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys, arguments, fragment):
    where = ["--output", str(tmp_path / "runs")] if arguments[:1] in (["run"], ["report"]) else []
    try:
        code = main([*arguments, *where])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert fragment in error
    assert not (tmp_path / "runs").exists()


def test_mistake_that_a_step_finds_ends_the_run_with_its_line_and_a_report(tmp_path):
    toml = tiny_toml(tmp_path)
    done = pipelines("run", "--config", str(toml), "--set", "model.uri=tiny://gpt9", "--run", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: check: tiny://gpt9: unknown architecture; known: qwen2\n"
    run = tmp_path / "runs" / "x"
    assert sorted(path.name for path in run.iterdir()) == ["check.failed.json", "config.json", "report", "report.json"]
    assert "── check ─" in done.stdout
    assert "KFP" not in done.stdout
    assert "python -m pipelines run --resume runs/x" in done.stdout


def test_killed_step_is_named(tmp_path):
    (tmp_path / "killer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    toml = tiny_toml(tmp_path)
    reward = 'task.rewards=[{kind="python", function="killer:score"}]'
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "pipelines", "run", "--config", str(toml), "--set", reward]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: check: was killed, most likely for lack of memory")
    assert done.stderr.count("\n") == 1
