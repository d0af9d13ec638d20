"""The step with a TrainJob, and its node as a process: exactly what the job says is run, over an object store."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from components.data_prep.step import STEP as DATA_PREP
from components.lora_rl.step import STEP as LORA_RL
from components.runner import execute
from components.sft_warmup.step import STEP as SFT_WARMUP
from tests.cluster.trainer_api import TrainerApi, trainer_api
from tests.s3_server import S3Server, s3_server
from tests.tiny_run import tiny_config
from tuneloop.models.adapter_io import load_adapter
from tuneloop.storage import download_tree, open_storage

__all__ = ["s3_server", "trainer_api"]

ROOT = Path(__file__).parents[2]
RUN = "s3://models/runs/trainjob"
TRAINJOB = (
    'lora_rl.distributed.launcher="trainjob"', "lora_rl.distributed.trainjob.gpus=0",
    "lora_rl.distributed.trainjob.nodes=1", 'task.system_prompt="costs $$(HOME)"',
)  # fmt: skip


def node(server: TrainerApi, cache: Path, ended: list[subprocess.CompletedProcess]) -> None:
    """The cluster: runs the job's command, as the torch runtime has it run."""
    trainer = server.job()["spec"]["trainer"]
    pod = server.start_node(0)
    environment = {
        **os.environ, "PET_NNODES": str(trainer["numNodes"]), "PET_NODE_RANK": "0", "PET_MASTER_PORT": "29500",
        "PET_MASTER_ADDR": "localhost", "TUNELOOP_CACHE": str(cache), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, *trainer["command"][1:], *trainer["args"]]
    ended.append(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True))
    server.write(pod, *ended[0].stdout.splitlines())
    server.end_node(pod, ended[0].returncode)
    server.set_condition("Complete" if ended[0].returncode == 0 else "Failed")


def test_the_job_makes_the_output_of_the_step(
    s3_server: S3Server,
    trainer_api: TrainerApi,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
):
    config = tiny_config(*TRAINJOB)
    inputs = {"data": f"{RUN}/data_prep", "warmup": f"{RUN}/sft_warmup"}
    execute(DATA_PREP, config, {}, inputs["data"])
    execute(SFT_WARMUP, config, {"data": inputs["data"]}, inputs["warmup"])
    execute(LORA_RL, tiny_config(TRAINJOB[-1]), inputs, str(tmp_path / "inline"))
    ended: list[subprocess.CompletedProcess] = []
    threading.Thread(target=node, args=(trainer_api, tmp_path / "node", ended), daemon=True).start()
    result = execute(LORA_RL, config, inputs, f"{RUN}/lora_rl")
    assert ended[0].returncode == 0, ended[0].stderr
    assert "node 0 | lora_rl" in capfd.readouterr().out  # its progress
    assert result.summary["updates"] == 2
    made = download_tree(f"{RUN}/lora_rl", tmp_path / "made")
    expected = load_adapter(tmp_path / "inline" / "adapter").factors
    for name, factors in load_adapter(made / "adapter").factors.items():
        assert all(bool((mine == theirs).all()) for mine, theirs in zip(factors, expected[name], strict=True))
    assert open_storage(f"{RUN}/lora_rl.partial").list() == []
    posted = len(trainer_api.posted)
    assert execute(LORA_RL, config, inputs, f"{RUN}/lora_rl").fingerprint == result.fingerprint
    assert len(trainer_api.posted) == posted == 1
