"""The command line in this process, as tests of clusters use it."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from components.config import RunConfig
from pipelines.argo import objects
from pipelines.cli import main
from pipelines.cluster import kfp_pipelines, kfp_schedules
from pipelines.kfp_rendering import kubernetes_package
from tests.tiny_run import tiny_toml
from tuneloop.config import resolved_json

RUNS = "s3://models/runs"
ON_A_CLUSTER = ("--set", "promote.registry=s3://models/registry")


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def run(self) -> str:
        """The run's name that `submit` printed."""
        match = re.search(r"^run: ([^,\s]+)", self.out, re.MULTILINE)
        assert match, self.out
        return match[1]


class Command:
    """Calls `python -m pipelines …`."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]):
        self.toml = tiny_toml(folder)
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Answer:
        self._capsys.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Answer(code, *self._capsys.readouterr())

    def submit(self, *arguments: str, output: str = RUNS) -> Answer:
        """`submit` of the tiny run."""
        return self("submit", "--config", str(self.toml), *ON_A_CLUSTER, "--output", output, *arguments)


@functools.cache
def _package(config: str) -> str:
    return kubernetes_package(RunConfig.model_validate_json(config))


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line in an empty home; each config is compiled once, which takes longer than everything else."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for module in (kfp_pipelines, kfp_schedules, objects):
        monkeypatch.setattr(module, "kubernetes_package", lambda config: _package(resolved_json(config)))
    return Command(tmp_path, capsys)
