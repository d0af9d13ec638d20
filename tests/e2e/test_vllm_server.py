"""lora_rl on a real vLLM, and the adapter that it leaves served by vLLM's own OpenAI server.

Run time on two idle cores: a minute and a half, most of it four starts of vLLM.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from components.config import load_run_config
from components.runner import execute
from pipelines.steps import STEPS
from tests.vllm_here import needs_vllm
from tuneloop.data.reader import read_examples
from tuneloop.evaluation.contenders import Contender, answer_all
from tuneloop.evaluation.harness import AnswerSettings
from tuneloop.models.adapter_io import load_adapter
from tuneloop.models.sources import resolve_model
from tuneloop.rewards.base import build_scorer
from tuneloop.settings import SamplingSettings

pytestmark = needs_vllm

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "ci.toml"
BASE = "tiny://qwen2?seed=0&hidden_size=128&heads=4&kv_heads=2"  # heads of 32: vLLM's CPU kernels know none of 16
UPDATES = 14
SETTINGS = (
    f"model.uri={BASE}", "sft_warmup.updates=30", "lora_rl.engine.kind=vllm", "lora_rl.engine.sync=adapter",
    "lora_rl.engine.max_sequences=512",
    f"lora_rl.updates={UPDATES}", "lora_rl.prompts_per_update=64", "lora_rl.optimizer.learning_rate=0.002",
    "lora_rl.validate_every=7", "lora_rl.algorithm.minibatches=4",
)  # fmt: skip
CLOCK_AND_MEMORY = ("time", "seconds/", "tokens_per_second/", "memory/")  # columns that differ from run to run


@dataclass(frozen=True)
class Trained:
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "lora_rl"

    def rows(self, output: Path | None = None) -> list[dict]:
        path = (output or self.output) / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: row[key] for key in row if not key.startswith(CLOCK_AND_MEMORY)} for row in rows]


def run_step(name: str, folder: Path, output: Path) -> None:
    inputs = {key: str(folder / source) for key, source in STEPS[name].items()}
    execute(
        importlib.import_module(f"components.{name}.step").STEP, load_run_config(CONFIG, SETTINGS), inputs, str(output)
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("vllm")
    for name in ("data_prep", "sft_warmup", "lora_rl"):
        run_step(name, folder, folder / name)
    return Trained(folder)


def test_the_reward_rises_and_every_sync_arrives(trained: Trained):
    rows = trained.rows()[1:]
    assert len(rows) == UPDATES
    reward = [row["reward/mean"] for row in rows]
    assert sum(reward[-4:]) / 4 > sum(reward[:4]) / 4 + 0.1, reward
    assert all(row["canary/gap"] < 1e-4 and row["canary/changed"] == 1.0 for row in rows)
    assert all(row["divergence/mean"] < 1e-4 for row in rows)
    assert "Initializing a V1 LLM engine" in (trained.output / "engine.log").read_text()
    assert not [child for child in psutil.Process().children() if "vllm_worker" in " ".join(child.cmdline())]


def test_a_vllm_that_is_killed_costs_the_rollout_and_not_the_run(trained: Trained, tmp_path: Path, capfd):
    output = tmp_path / "lora_rl"
    killed: list[int] = []

    def kill_it() -> None:
        metrics = tmp_path / "lora_rl.partial" / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
            time.sleep(0.02)
        [child] = [child for child in psutil.Process().children() if "vllm_worker" in " ".join(child.cmdline())]
        os.kill(child.pid, signal.SIGKILL)
        killed.append(child.pid)

    killer = threading.Thread(target=kill_it, daemon=True)
    killer.start()
    run_step("lora_rl", trained.folder, output)
    assert killed
    assert "starting it again, 1 of 3" in capfd.readouterr().out
    assert trained.rows(output) == trained.rows()
    assert load_adapter(output / "adapter").digest() == load_adapter(trained.output / "adapter").digest()


@contextmanager
def server(*arguments: str, log: Path) -> Iterator[str]:
    """vLLM's OpenAI server on a loopback port; gives its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quick = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
             "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **quick},
        )
    try:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None and not _answers(port):
            time.sleep(0.2)
        assert _answers(port), log.read_text()[-3000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_served_by_vllms_openai_server_it_answers_as_it_was_evaluated(trained: Trained, tmp_path: Path):
    import openai

    config, base = load_run_config(CONFIG, SETTINGS), resolve_model(BASE)
    examples = read_examples(trained.folder / "data_prep" / "test.parquet", 40)
    settings = AnswerSettings(1, SamplingSettings(), config.task.max_new_tokens, seed=0)
    adapter = load_adapter(trained.output / "adapter")
    contenders = [Contender("base", base), Contender("candidate", base, adapter)]
    answers = answer_all(contenders, examples, build_scorer(config.task.rewards), settings, "float32")
    expected = {name: [answer.completion for answer in made.greedy] for name, made in answers.items()}
    assert expected["base"] != expected["candidate"]

    arguments = ["--model", str(base), "--served-model-name", "base", "--dtype", "float32", "--enforce-eager",
                 "--max-model-len", "128", "--max-num-seqs", "16", "--generation-config", "vllm", "--enable-lora",
                 "--max-lora-rank", "8", "--lora-modules", f"candidate={trained.output / 'adapter'}"]  # fmt: skip
    with server(*arguments, log=tmp_path / "server.log") as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        assert {model.id for model in client.models.list()} == {"base", "candidate"}
        for name in ("candidate", "base"):
            served = [
                client.chat.completions.create(
                    model=name,
                    messages=example.messages,  # type: ignore[arg-type]
                    temperature=0.0,
                    max_tokens=config.task.max_new_tokens,
                )
                .choices[0]
                .message.content
                for example in examples
            ]
            # The untrained base is cut off within characters, whose first bytes the server keeps back.
            assert [text.rstrip("\ufffd") for text in served if text is not None] == [
                text.rstrip("\ufffd") for text in expected[name]
            ]
    assert sum("\ufffd" in text for text in expected["candidate"]) == 0
