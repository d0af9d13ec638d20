"""What surrounds vLLM and needs none: files in memory, the child's end with its parent, one engine for many."""

import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest

from tests.tiny_run import tiny_config
from tuneloop.errors import UserError
from tuneloop.rollout import shared_memory, vllm_process
from tuneloop.rollout.settings import VLLM_RANKS, EngineSettings, engine_rank
from tuneloop.rollout.shared_memory import PrivateFolder, model_in_memory
from tuneloop.rollout.vllm_process import EngineProcess

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_killed_process_leaves_a_folder_that_the_next_one_removes(tmp_path: Path):
    code = (
        "import sys, time; from pathlib import Path; from tuneloop.rollout.shared_memory import PrivateFolder\n"
        "folder = PrivateFolder(Path(sys.argv[1])); (folder.path / 'adapter').write_text('weights')\n"
        "print(folder.path, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert child.stdout
    left = Path(child.stdout.readline().decode().strip())
    mine = PrivateFolder(tmp_path)
    assert (left / "adapter").exists()  # its owner lives
    child.kill()
    child.wait()
    child.stdout.close()
    other = PrivateFolder(tmp_path)
    assert not left.exists()
    assert mine.path.exists()
    mine.close()
    mine.close()
    other.close()
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    with pytest.raises(UserError, match="is no folder"):
        PrivateFolder(tmp_path / "nowhere")


def test_the_base_model_is_copied_once_for_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, root = tmp_path / "base", tmp_path / "shm"
    base.mkdir()
    root.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights of the model")
    copy = model_in_memory(base, root)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == {
        path.name: path.read_bytes() for path in base.iterdir()
    }

    monkeypatch.setattr(shared_memory, "sha256_of", None)  # files that look as before are not read again
    assert model_in_memory(base, root) == copy
    monkeypatch.undo()

    os.utime(base / "config.json", (1, 1))  # other times, equal content: found by content
    inode = (copy / "config.json").stat().st_ino
    assert model_in_memory(base, root) == copy
    assert (copy / "config.json").stat().st_ino == inode

    (base / "model.safetensors").write_bytes(b"weights of no  model")
    assert model_in_memory(base, root) != copy

    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 7, 3))  # type: ignore[attr-defined]
    (base / "model.safetensors").write_bytes(b"weights of a model!!")
    with pytest.raises(UserError, match="use_shm"):
        model_in_memory(base, root)
    assert not list(root.glob("*/*.partial"))


def test_the_child_ends_with_its_parent():
    ours, theirs = Pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "tuneloop.rollout.vllm_worker", str(theirs.fileno())],
        cwd=REPOSITORY,
        pass_fds=(theirs.fileno(),),
        start_new_session=True,
    )
    theirs.close()
    ours.send_bytes(b'{"call": "unheard_of"}')
    assert b"failed" in ours.recv_bytes()  # it listens
    started = time.monotonic()
    ours.close()
    assert child.wait(30) == -signal.SIGKILL
    assert time.monotonic() - started < 10


def test_what_a_killed_engine_shares_with_its_workers_goes_with_it():
    code = (
        "import subprocess, sys, time; from multiprocessing.shared_memory import SharedMemory\n"
        "held = SharedMemory(create=True, size=4096); worker = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)'])\nprint(held.name, worker.pid, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout
    name, worker = child.stdout.readline().decode().split()
    engine = EngineProcess.__new__(EngineProcess)
    engine._process, engine._connection = child, Pipe()[0]  # as if vLLM ran in it
    assert Path("/dev/shm", name).exists()
    engine.kill()
    child.stdout.close()
    assert not Path("/dev/shm", name).exists()
    assert not vllm_process._members(child.pid)
    assert not Path("/proc", worker).exists() or "Z" in Path("/proc", worker, "stat").read_text()


def test_engine_rank_is_the_next_one_up():
    assert [engine_rank(rank) for rank in (1, 2, 8, 9, 64, 129, 257, 321, 512)] == [1, 8, 8, 16, 64, 256, 320, 512, 512]
    assert all(engine_rank(rank) == rank for rank in VLLM_RANKS)
    with pytest.raises(ValueError, match=r'rank 513 .* sync = "merged"'):
        engine_rank(513)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("engine.use_shm=true",), 'use_shm is of the vllm engine: set kind = "vllm"'),
        (("engine.kind=vllm", "sampling.temperature=0.7", "sampling.top_k=20"), "before top_k and top_p"),
        (("engine.kind=vllm", "mode=full"), 'set engine.kind = "torch"'),
        (("engine.kind=vllm", "engine.gpu_memory_utilization=1.0"), "gpu_memory_utilization"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_in_the_config(settings: tuple[str, ...], reason: str):
    with pytest.raises(UserError, match=reason):
        tiny_config(*(f"lora_rl.{setting}" for setting in settings))
    tiny_config(*(f"lora_rl.{setting}" for setting in settings[:-1]))


def test_sampling_that_vllm_cannot_report_is_refused_for_the_evaluation_too():
    with pytest.raises(UserError, match="before top_k and top_p"):
        tiny_config("evaluate.engine.kind=vllm", "evaluate.sampling.temperature=0.7", "evaluate.sampling.top_k=20")
    tiny_config("evaluate.engine.kind=vllm", "evaluate.sampling.top_k=20", "evaluate.sampling.temperature=1.0")


def test_a_resolved_config_is_read_again():
    assert EngineSettings(**EngineSettings().model_dump()) == EngineSettings()
