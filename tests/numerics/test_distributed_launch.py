"""Starting several processes and ending them together: whatever happens to one of them is said once, in one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tuneloop.errors import UserError
from tuneloop.training.launch import ProcessFailed, process_count, run_processes
from tuneloop.training.settings import DistributedSettings

PARENT = """
import sys
from components.exit_codes import exit_code_of
from tuneloop.training.launch import run_processes
sys.exit(exit_code_of(lambda: run_processes(["-m", "tests.numerics.launch_work", sys.argv[1]], 2, grace_seconds=2)))
"""


def launch(how: str):
    return run_processes(["-m", "tests.numerics.launch_work", how], 2, grace_seconds=2)


def parent(how: str, **options) -> subprocess.Popen:
    root = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
        **options,
    )


def test_processes_find_each_other_and_the_first_speaks(capfd):
    outcomes = launch("well")
    assert [outcome.summary["ranks"] for outcome in outcomes] == [[0, 1], [0, 1]]
    assert [outcome.summary["shares"] for outcome in outcomes] == [[0, 2, 4], [1, 3]]
    assert all(outcome.peak_rss_bytes > 1e7 for outcome in outcomes)
    printed = capfd.readouterr()
    assert printed.out == "a line of process 0\n"
    assert printed.err == ""


def test_the_users_mistake_comes_through_in_one_line(capfd):
    with pytest.raises(UserError, match=r"^something to change$"):
        launch("mistake")
    assert capfd.readouterr().err == ""


def test_a_bug_of_one_process_is_shown_and_ends_the_other(capfd):
    with pytest.raises(ProcessFailed, match=r"^process 1: ValueError: a bug of process 1$"):
        launch("bug")
    error = capfd.readouterr().err
    assert error.count("Traceback") == 1
    assert 'raise ValueError("a bug of process 1")' in error


def test_a_killed_process_ends_the_other():
    with pytest.raises(ProcessFailed, match="process 1 of 2 was killed by SIGKILL"):
        launch("killed")


def test_a_hanging_process_is_not_waited_for():
    started = time.monotonic()
    with pytest.raises(ProcessFailed, match="process 0: "):
        launch("hangs")
    assert time.monotonic() - started < 60


def test_sigterm_stops_all_of_them_together():
    process = parent("stopped")
    assert process.stdout
    for line in process.stdout:
        if line == "waiting\n":
            break
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (75, "error: stopped after update 7\n")


def test_sigterm_before_they_listen_stops_them_too():
    process = parent("deaf")
    assert process.stdout
    for line in process.stdout:
        if line == "waiting\n":
            break
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert error.startswith("error: stopped before all processes were there; ")


def test_children_die_with_a_killed_parent():
    process = parent("stopped")
    assert process.stdout
    for line in process.stdout:
        if line == "waiting\n":
            break
    family = _descendants(process.pid)
    assert len(family) >= 3  # the launcher and two children
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(_lives(pid) for pid in family) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in family if _lives(pid)]


def _descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return children + [descendant for child in children for descendant in _descendants(child)]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_auto_means_one_process_without_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert process_count(DistributedSettings()) == 1
    assert process_count(DistributedSettings(processes=3)) == 3


def test_auto_means_one_process_a_gpu_and_no_more_are_given(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert process_count(DistributedSettings()) == 4
    with pytest.raises(UserError, match="there are 4 GPUs"):
        process_count(DistributedSettings(processes=5))
