"""What happens in a cluster while the step that trains by a TrainJob runs."""

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from components import api_calls
from components.config import RunConfig
from components.exit_codes import exit_code_of
from components.lora_rl.trainjob import api, launcher, pods
from components.lora_rl.trainjob.launcher import launch
from tests.cluster.trainer_api import TrainerApi
from tests.tiny_run import tiny_config

OUTPUT = "s3://bucket/runs/first/lora_rl"
INPUTS = {"data": "s3://bucket/runs/first/data_prep", "warmup": "s3://bucket/runs/first/sft_warmup"}
SETTINGS = (
    'lora_rl.distributed.launcher="trainjob"', "lora_rl.distributed.trainjob.gpus=4", 'cluster.queue="tuneloop"',
    "lora_rl.distributed.trainjob.patience_seconds=30",
)  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often."""
    monkeypatch.setattr(launcher, "WATCH_SECONDS", 4.0)
    monkeypatch.setattr(launcher, "_GONE_POLL_SECONDS", 0.02)
    monkeypatch.setattr(launcher, "LOG_SECONDS", 2.0)
    monkeypatch.setattr(pods, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(api, "_AGAIN_SECONDS", 0.02)
    monkeypatch.setattr(api_calls, "_FIRST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(api_calls, "LONGEST_WAIT_SECONDS", 0.2)


class Cluster:
    """What happens in the cluster while the step runs: `story`, in a thread."""

    def __init__(self, server: TrainerApi):
        self.server = server
        self.message = ""

    def launch(self, story: Callable[[], Any], *settings: str, config: RunConfig | None = None) -> int:
        """Run the step, and meanwhile the story; returns the step's exit code."""
        found: list[BaseException] = []
        over: list[bool] = []

        def tell() -> None:
            try:
                story()
            except BaseException as error:
                found.append(error)
                if over:
                    return
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

        def note(code: int, message: str) -> None:
            self.message = message

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        config = config or tiny_config(*SETTINGS, *settings)
        code = exit_code_of(lambda: launch(config, INPUTS, OUTPUT, "fingerprint"), note)
        over.append(True)
        thread.join(20)
        if found:
            raise found[0]
        return code

    def run(self) -> list[str]:
        """The nodes start; returns their pods."""
        self.server.admit()
        return [self.server.start_node(node, f"line {node}") for node in range(2)]

    def complete(self, started: list[str]) -> None:
        """The nodes end well."""
        for pod in started:
            self.server.end_node(pod)
        self.server.set_condition("Complete")

    def whole(self) -> None:
        """All of it."""
        self.complete(self.run())

    @property
    def left(self) -> list[Any]:
        """TrainJobs that stay; one that is being removed is waited for."""
        deadline = time.monotonic() + 5
        while self.server.objects and time.monotonic() < deadline:
            if not any("deletionTimestamp" in job["metadata"] for job in self.server.objects.values()):
                break
            time.sleep(0.01)
        return list(self.server.objects.values())


@pytest.fixture
def cluster(trainer_api: TrainerApi) -> Cluster:
    return Cluster(trainer_api)
