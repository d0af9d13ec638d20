"""lora_rl on two nodes that share nothing but an object store: one process each, found by torchrun's variables."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from components.data_prep.step import STEP as DATA_PREP
from components.lora_rl import node
from components.lora_rl.step import STEP as LORA_RL
from components.runner import execute
from components.sft_warmup.step import STEP as SFT_WARMUP
from tests.s3_server import S3Server, s3_server  # noqa: F401
from tests.tiny_run import tiny_config
from tuneloop.errors import UserError
from tuneloop.models.adapter_io import load_adapter
from tuneloop.storage import download_tree, open_storage
from tuneloop.training.nodes import Nodes

pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'tuneloop[deepspeed]'")

ROOT = Path(__file__).parents[2]
OVERRIDES = (
    "lora_rl.updates=4", "lora_rl.prompts_per_update=6", "lora_rl.group_size=4", "lora_rl.micro_batch_tokens=60",
    "lora_rl.checkpoint_every=1", "lora_rl.validate_every=4", 'task.rewards=[{kind="format", pattern="[^a-m]*"}]',
)  # fmt: skip
TWO = "lora_rl.distributed.processes=2"
RUN = "s3://models/runs/nodes"
OUTPUT = f"{RUN}/lora_rl"


@pytest.fixture
def inputs(s3_server: S3Server) -> dict[str, str]:  # noqa: F811
    uris = {"data": f"{RUN}/data_prep", "warmup": f"{RUN}/sft_warmup"}
    execute(DATA_PREP, tiny_config(*OVERRIDES), {}, uris["data"])
    execute(SFT_WARMUP, tiny_config(*OVERRIDES), {"data": uris["data"]}, uris["warmup"])
    return uris


def request_of(inputs: dict[str, str], *overrides: str) -> str:
    config = tiny_config(*OVERRIDES, *overrides).model_dump(mode="json")
    return json.dumps({"config": config, "inputs": inputs, "output": OUTPUT})


def place_of(rank: int, port: int) -> dict[str, str]:
    """What a torch runtime tells one of two nodes."""
    return {
        "PET_NNODES": "2", "PET_NODE_RANK": str(rank), "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port),
    }  # fmt: skip


def start_nodes(folder: Path, inputs: dict[str, str], *overrides: str) -> list[subprocess.Popen]:
    """Both nodes, each with a disk of its own that is empty."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    nodes = []
    for rank in range(2):
        environment = {
            **os.environ, **place_of(rank, port), "TUNELOOP_CACHE": str(folder / f"node-{rank}"),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, "-m", "components.lora_rl.node", request_of(inputs, *overrides)]
        nodes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return nodes


def ended(nodes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Each one's exit code, output and errors."""
    found = [process.communicate(timeout=240) for process in nodes]
    return [(process.returncode, *texts) for process, texts in zip(nodes, found, strict=True)]


def test_nodes_that_are_lost_and_begin_again_on_empty_disks_make_the_adapter_of_one_machine(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    alone = tmp_path / "alone"
    execute(LORA_RL, tiny_config(*OVERRIDES, TWO), inputs, str(alone))

    nodes = start_nodes(tmp_path / "first", inputs)
    saved, deadline = open_storage(f"{OUTPUT}.partial"), time.monotonic() + 200
    while not any(key.endswith("/COMMITTED") for key in saved.list("checkpoints")):
        assert all(process.poll() is None for process in nodes), ended(nodes)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for process in nodes:
        process.kill()
    ended(nodes)

    (first, output, error), (second, other_output, other_error) = ended(start_nodes(tmp_path / "second", inputs))
    assert (first, second) == (0, 0), error + other_error
    assert "continuing from the checkpoint of update" in output
    assert "update" not in other_output  # the first node speaks
    assert saved.list() == []
    together = download_tree(OUTPUT, tmp_path / "together")
    expected, found = load_adapter(alone / "adapter"), load_adapter(together / "adapter")
    for name, factors in expected.factors.items():
        for mine, theirs in zip(found.factors[name], factors, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    rows = [json.loads(line) for line in (together / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(5))
    assert json.loads((together / "step.json").read_text())["summary"]["processes"] == 2

    monkeypatch.setenv("TUNELOOP_CACHE", str(tmp_path / "third"))
    for rank in "01":  # started again after the output was published
        for name, value in place_of(int(rank), 1).items():
            monkeypatch.setenv(name, value)
        assert node.main(request_of(inputs)) == 0


def test_one_node_that_is_told_to_stop_stops_both_and_what_is_done_is_in_the_store(
    inputs: dict[str, str], tmp_path: Path
):
    nodes = start_nodes(tmp_path, inputs, "lora_rl.updates=500", "lora_rl.checkpoint_every=500")
    output = nodes[0].stdout
    assert output
    for line in output:
        if "reward" in line:
            break
    nodes[1].send_signal(signal.SIGTERM)
    (first, _, error), (second, *_) = ended(nodes)
    assert (first, second) == (75, 75), error
    assert "stopped after update" in error
    saved = open_storage(f"{OUTPUT}.partial").list("checkpoints")
    assert [key for key in saved if key.endswith("/COMMITTED")]


def test_a_mistake_is_left_where_kubernetes_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    words = tmp_path / "termination-log"
    words.touch()
    monkeypatch.setattr(node, "TERMINATION_LOG", words)
    wanted = {"config": {"name": "x"}, "inputs": {}, "output": OUTPUT}
    assert node.main(json.dumps(wanted)) == 2
    assert words.read_text().startswith("the request: ")


def test_nodes_are_what_torchruns_variables_say():
    known = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "a.b", "PET_MASTER_PORT": "29500"}
    assert Nodes.from_environment(known) == Nodes(2, 1, "a.b", 29500)
    assert Nodes.from_environment({}) == Nodes()
    for wrong in ({**known, "PET_NODE_RANK": "2"}, {**known, "PET_NNODES": "1:2"}, {"PET_NNODES": "2"}):
        with pytest.raises(UserError, match="PET_NNODES"):
            Nodes.from_environment(wrong)
