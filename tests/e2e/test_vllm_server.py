"""lora_rl on a real vLLM, and the adapter that it leaves served by vLLM's own OpenAI server.

Run time on two idle cores: two minutes, most of it five starts of vLLM.
"""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from components.config import load_run_config
from components.runner import execute
from pipelines.steps import STEPS
from tests.vllm_here import needs_vllm
from tuneloop.data.reader import read_examples
from tuneloop.data.schema import Example
from tuneloop.evaluation.contenders import Contender, answer_all
from tuneloop.evaluation.harness import AnswerSettings
from tuneloop.models.adapter_io import load_adapter
from tuneloop.models.sources import resolve_model
from tuneloop.registry import Registry
from tuneloop.rewards.base import build_scorer
from tuneloop.serving.alias_follower import AliasFollower, Status
from tuneloop.serving.vllm_server import VllmServer
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
SERVER = "vllm.entrypoints.openai.api_server"
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
def server(*arguments: str, log: Path, module: str = SERVER, **environment: str) -> Iterator[str]:
    """vLLM's OpenAI server on a loopback port; gives its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quick = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
             "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}  # fmt: skip
    command = [sys.executable, "-m", *module.split(), "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **quick, **environment},
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


def evaluated(trained: Trained, examples: list[Example], **adapters: Path) -> dict[str, list[str]]:
    """Name -> greedy answers to the examples, as evaluate makes them; "base" is answered too."""
    config, base = load_run_config(CONFIG, SETTINGS), resolve_model(BASE)
    settings = AnswerSettings(1, SamplingSettings(), config.task.max_new_tokens, seed=0)
    contenders = [Contender("base", base)]
    contenders += [Contender(name, base, load_adapter(folder)) for name, folder in adapters.items()]
    answers = answer_all(contenders, examples, build_scorer(config.task.rewards), settings, "float32")
    return {name: [answer.completion for answer in made.greedy] for name, made in answers.items()}


def base_arguments() -> list[str]:
    return ["--model", str(resolve_model(BASE)), "--served-model-name", "base", "--dtype", "float32", "--enforce-eager",
            "--max-model-len", "128", "--max-num-seqs", "16", "--generation-config", "vllm", "--enable-lora",
            "--max-lora-rank", "8"]  # fmt: skip


def ask(client, model: str, example: Example) -> str:
    """One greedy answer of the server."""
    tokens = load_run_config(CONFIG, SETTINGS).task.max_new_tokens
    answer = client.chat.completions.create(
        model=model,
        messages=example.messages,
        temperature=0.0,
        max_tokens=tokens,  # type: ignore[arg-type]
    )
    return answer.choices[0].message.content


def test_served_by_vllms_openai_server_it_answers_as_it_was_evaluated(trained: Trained, tmp_path: Path):
    import openai

    examples = read_examples(trained.folder / "data_prep" / "test.parquet", 40)
    expected = evaluated(trained, examples, candidate=trained.output / "adapter")
    assert expected["base"] != expected["candidate"]
    arguments = [*base_arguments(), "--lora-modules", f"candidate={trained.output / 'adapter'}"]
    with server(*arguments, log=tmp_path / "server.log") as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        assert {model.id for model in client.models.list()} == {"base", "candidate"}
        for name in ("candidate", "base"):
            served = [ask(client, name, example) for example in examples]
            # The untrained base is cut off within characters, whose first bytes the server keeps back.
            assert [text.rstrip("\ufffd") for text in served if text is not None] == [
                text.rstrip("\ufffd") for text in expected[name]
            ]
    assert sum("\ufffd" in text for text in expected["candidate"]) == 0


def status_for_others(url: str, path: str, body: dict | None = None) -> int:
    """What the server answers to a client that is not 127.0.0.1, as those of other machines are not."""
    place = urlsplit(url)
    connection = HTTPConnection(place.hostname or "", place.port, timeout=60, source_address=("127.0.0.2", 0))
    try:
        connection.request("POST" if body else "GET", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection.getresponse().status
    finally:
        connection.close()


def too_large(folder: Path, to: Path) -> Path:
    """A copy of an adapter that says it has rank 64."""
    shutil.copytree(folder, to)
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps({**config, "r": 64}))
    return to


@contextmanager
def asking_without_pause(client, example: Example) -> Iterator[list[str]]:
    """Ask for the adapter again and again; an error is raised at the end."""
    answers: list[str] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answers.append(ask(client, "sums", example))

    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(keep_asking) for _ in range(2)]
        try:
            yield answers
        finally:
            stop.set()
            for thread in threads:
                thread.result()


def test_moving_the_alias_switches_a_running_vllm(trained: Trained, tmp_path: Path):
    import openai

    adapters = {"candidate": trained.output / "adapter", "warmed_up": trained.folder / "sft_warmup" / "adapter"}
    examples = read_examples(trained.folder / "data_prep" / "test.parquet", 40)
    expected = evaluated(trained, examples, **adapters)
    numbers = range(len(examples))
    telling = [number for number in numbers if not any("\ufffd" in expected[name][number] for name in adapters)]
    differing = next(number for number in telling if expected["candidate"][number] != expected["warmed_up"][number])

    registry = Registry(str(tmp_path / "registry"))
    folders = [adapters["warmed_up"], adapters["candidate"], too_large(adapters["candidate"], tmp_path / "large")]
    for number, folder in enumerate(folders):
        registry.register("sums", folder, {"adapter_digest": f"sha256:{number}", "parent": None, "base_uri": BASE})
    registry.promote("sums", 1, "production", None)
    updating = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with server(*base_arguments(), log=tmp_path / "server.log", module="tuneloop.serving vllm", **updating) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        vllm = VllmServer(url.removesuffix("/v1"))
        follower = AliasFollower(registry, "sums", "production", vllm, tmp_path / "served", BASE)
        assert follower.look() == Status(1, 1)
        assert [ask(client, "sums", examples[number]) for number in telling] == [
            expected["warmed_up"][number] for number in telling
        ]

        registry.promote("sums", 2, "production", 1)
        with asking_without_pause(client, examples[differing]) as answers:
            assert follower.look() == Status(2, 2)
            for version in (1, 2) * 5:
                registry.promote("sums", version, "production", 3 - version)
                assert follower.look() == Status(version, version)
        assert len(answers) > 10
        assert [ask(client, "sums", examples[number]) for number in telling] == [
            expected["candidate"][number] for number in telling
        ]

        prompt = {"model": "sums", "prompt": "1", "max_tokens": 1}
        assert status_for_others(url, "/v1/completions", prompt) == status_for_others(url, "/health") == 200
        stranger = {"lora_name": "sums", "lora_path": str(adapters["warmed_up"]), "load_inplace": True}
        for path, body in {
            "/v1/load_lora_adapter": stranger, "/v1/unload_lora_adapter": {"lora_name": "sums"},
            "/adapters": {"name": "other", "src": stranger["lora_path"]}, "/invocations": prompt,
        }.items():  # fmt: skip
            assert status_for_others(url, path, body) == 403, path
        assert vllm.adapters().keys() == {"sums"}

        folder = Path(vllm.adapters()["sums"])
        folder.rename(tmp_path / "away")  # what is read from the disk at every step would be missed now
        assert ask(client, "sums", examples[differing]) == expected["candidate"][differing]
        (tmp_path / "away").rename(folder)

        registry.promote("sums", 3, "production", 2)
        refused = follower.look()
        assert (refused.wanted, refused.served) == (3, 2)
        assert "rank 64" in refused.problem
        assert ask(client, "sums", examples[differing]) == expected["candidate"][differing]

        registry.promote("sums", 1, "production", 3)
        assert follower.look() == Status(1, 1)
        assert ask(client, "sums", examples[differing]) == expected["warmed_up"][differing]
        assert vllm.adapters().keys() == {"sums"}
