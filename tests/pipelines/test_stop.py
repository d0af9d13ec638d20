"""Stopping a run by a real signal: it saves, says how to go on, leaves no process behind, and goes on."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_run import tiny_toml

REPOSITORY = Path(__file__).resolve().parents[2]
# Its import, in the check step, takes until it is told otherwise; what a long step is to a user.
SLOW = """
import os, pathlib, time
pathlib.Path("pid").write_text(str(os.getpid()))
while not pathlib.Path("go").exists():
    time.sleep(0.02)
def score(completion, answer, metadata):
    return 1.0
"""


@pytest.fixture
def run(tmp_path):
    """A run in a process group of its own, in the middle of its first step."""
    (tmp_path / "slow_reward.py").write_text(SLOW)
    reward = 'task.rewards=[{kind="python", function="slow_reward:score"}]'
    command = [sys.executable, "-m", "pipelines", "run", "--config", str(tiny_toml(tmp_path)), "--set", reward]
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    process = subprocess.Popen(
        [*command, "--run", "x"],
        cwd=tmp_path, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200  # a busy machine starts Python slowly
        while not (tmp_path / "pid").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        assert (tmp_path / "pid").exists()
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False)],
    ids=["ctrl-c in a terminal", "SIGINT to the parent", "SIGTERM to the parent"],
)
def test_stop_leaves_no_process_and_says_how_to_continue(run, tmp_path, number, whole_group):
    os.killpg(run.pid, number) if whole_group else os.kill(run.pid, number)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 75, (out, err)
    assert err == (
        "error: stopped; what the running step had saved is kept; "
        "continue with: python -m pipelines run --resume runs/x\n"
    )
    assert "stopping: the running step saves its state" in out
    assert not alive(run.pid)
    assert not (tmp_path / "runs" / "x" / "check.partial").exists()
    assert not list((tmp_path / "runs" / "x").glob(".*lock"))


def test_second_signal_kills(run, tmp_path):
    step = int((tmp_path / "pid").read_text())
    os.kill(step, signal.SIGSTOP)  # a step that cannot react
    os.kill(run.pid, signal.SIGINT)
    time.sleep(0.3)
    assert run.poll() is None
    os.kill(run.pid, signal.SIGINT)
    run.communicate(timeout=120)
    assert run.returncode == 75
    assert not alive(run.pid)


def test_run_in_progress_cannot_be_resumed_beside_itself(run, tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "pipelines", "run", "--resume", "x", "--from", "check"]
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert second.stderr.endswith("another run is writing it; wait for it or choose another output\n")
    assert (tmp_path / "runs" / "x" / "check.partial").is_dir()
