"""The guarantees that every step gets from the runner, with steps of a few lines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.config import RunConfig
from components.exit_codes import exit_code_of
from components.node import run_in_pipeline
from components.result import StepResult
from components.runner import Step, execute
from components.step_command import main
from tests.tiny_run import tiny_config, tiny_toml
from tuneloop.errors import GateRefused, TryAgain, UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def write_answer(config, inputs, output):
    """Writes 42."""
    (output / "answer").write_text("42")
    return {"answer": 42, "text": "x"}


def copy_answer(config, inputs, output):
    """Copies the answer."""
    (output / "answer").write_text((inputs["data"] / "answer").read_text())
    return {}


PRODUCER = Step("check", (), write_answer, sections=("lora",))
CONSUMER = Step("data_prep", ("data",), copy_answer, sections=("data_prep",))


@pytest.fixture
def config() -> RunConfig:
    return tiny_config()


def failing(error: BaseException, *, leaves: str = "", resumable: bool = False) -> Step:
    def run(config, inputs, output):
        """Fails."""
        (output / "half").write_text("x")
        if leaves:
            (output / leaves).mkdir()
        raise error

    return Step("check", (), run, sections=("lora",), resumable=resumable)


def test_output_is_complete_and_recorded(config, tmp_path):
    result = execute(PRODUCER, config, {}, str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["answer", "config.json", "step.json"]
    assert StepResult.read(tmp_path / "out") == result
    assert result.summary == {"answer": 42, "text": "x"}
    assert result.peak_rss_bytes > 1e6


def test_finished_output_is_reused_only_for_the_same_settings(config, tmp_path, capsys):
    first = execute(PRODUCER, config, {}, str(tmp_path / "out"))
    (tmp_path / "out" / "answer").write_text("untouched")
    other_section = tiny_config("sft_warmup.updates=7")
    assert execute(PRODUCER, other_section, {}, str(tmp_path / "out")) == first
    assert "reusing" in capsys.readouterr().out
    assert (tmp_path / "out" / "answer").read_text() == "untouched"
    with pytest.raises(UserError, match="other settings or inputs"):
        execute(PRODUCER, tiny_config("lora.rank=2"), {}, str(tmp_path / "out"))


def test_fingerprint_follows_the_inputs(config, tmp_path):
    execute(PRODUCER, config, {}, str(tmp_path / "a"))
    execute(PRODUCER, tiny_config("lora.rank=2"), {}, str(tmp_path / "b"))
    one = execute(CONSUMER, config, {"data": str(tmp_path / "a")}, str(tmp_path / "one"))
    two = execute(CONSUMER, config, {"data": str(tmp_path / "b")}, str(tmp_path / "two"))
    assert one.fingerprint != two.fingerprint


@pytest.mark.parametrize("error", [UserError("no"), ValueError("bug"), TryAgain("later"), KeyboardInterrupt()])
def test_failure_leaves_nothing(config, tmp_path, error):
    with pytest.raises(type(error)):
        execute(failing(error), config, {}, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_resumable_step_keeps_checkpoints_and_nothing_less(config, tmp_path):
    with pytest.raises(TryAgain):
        execute(failing(TryAgain("later"), resumable=True), config, {}, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TryAgain):
        execute(failing(TryAgain("later"), leaves="checkpoints", resumable=True), config, {}, str(tmp_path / "out"))
    assert (tmp_path / "out.partial" / "checkpoints").is_dir()


def test_partial_output_is_continued_or_restarted(config, tmp_path, capsys):
    seen = []

    def run(config, inputs, output):
        """Notes what it found."""
        seen.append((output / "checkpoints").exists())
        (output / "checkpoints").mkdir(exist_ok=True)
        if len(seen) == 1:
            raise TryAgain("later")
        return {}

    step = Step("check", (), run, sections=("lora",), resumable=True)
    with pytest.raises(TryAgain):
        execute(step, config, {}, str(tmp_path / "out"))
    execute(step, tiny_config("lora.rank=2"), {}, str(tmp_path / "out"))
    assert seen == [False, False]
    assert not (tmp_path / "out" / "checkpoints").exists(), "a finished output needs no checkpoints"
    assert "starting over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError("u"), 2), (GateRefused("g"), 3), (TryAgain("t"), 75), (RuntimeError("a\nb"), 1), (None, 0)],
)
def test_exit_codes(capsys, error, code):
    failures = []

    def action():
        if error:
            raise error

    assert exit_code_of(action, lambda *failure: failures.append(failure)) == code
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == (1 if code in (2, 3, 75) else stderr.count("\n"))
    assert ("Traceback" in stderr) == (code == 1)
    assert failures == ([] if code == 0 else [(code, "RuntimeError: a b" if code == 1 else str(error))])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_repeated_signal_is_one_request(number):
    saved = []

    def action():
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except TryAgain:
            os.kill(os.getpid(), number)  # the parent passes on what the terminal has sent already
            saved.append(True)
            raise

    assert exit_code_of(action) == 75
    assert saved == [True]


def test_node_of_the_pipeline_records_failure_and_clears_it(tmp_path, capsys):
    class Numbers(dict):
        def log_metric(self, metric, value):
            self[metric] = value

    config, numbers = json.dumps(tiny_config().model_dump(mode="json")), Numbers()
    with pytest.raises(SystemExit) as stop:
        run_in_pipeline("check", config=config, output_uri=str(tmp_path), parameters={"lora_rank": 4000})
    assert stop.value.code == 2
    failed = json.loads((tmp_path / "check.failed.json").read_text())
    assert failed["step"] == "check"
    assert failed["exit_code"] == 2
    assert "lora.rank = 4000" in failed["message"]
    uri = run_in_pipeline("check", config=config, output_uri=str(tmp_path), parameters={"updates": 0}, metrics=numbers)
    assert uri == str(tmp_path / "check")
    assert not (tmp_path / "check.failed.json").exists()
    assert numbers["target_modules"] == 14
    assert "==> check" in capsys.readouterr().out.splitlines()


def test_two_processes_on_one_output(tmp_path):
    """The second is refused while the first runs, and finds its output afterwards."""
    slow = tmp_path / "slow_reward.py"
    slow.write_text(
        "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(1.5)\ndef score(c, a, m): return 1.0\n"
    )
    reward = 'task.rewards=[{kind="python", function="slow_reward:score"}]'
    toml = tiny_toml(tmp_path)
    command = [sys.executable, "-m", "components.check", "--config", str(toml), "--set", reward, "--output", "out"]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment)
    while not (tmp_path / "begun").exists() and first.poll() is None:
        time.sleep(0.02)
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "another run is writing it" in second.stderr
    assert first.wait() == 0
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


def test_wrong_arguments_are_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(PRODUCER, ["--config", "x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
