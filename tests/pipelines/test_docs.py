"""What the pages say can be done: links lead somewhere, commands and options exist, the first run's config is valid."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from components.config import RunConfig, load_run_config
from tuneloop.data.schema import Example
from tuneloop.rewards.base import build_scorer
from tuneloop.settings import RewardSettings, TaskSettings

REPOSITORY = Path(__file__).resolve().parents[2]
TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
PAGES = [REPOSITORY / name for name in TRACKED] or sorted((REPOSITORY / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"python -m pipelines (?P<command>[a-z]+)(?P<rest>[^\n`|]*)")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_commands_and_options_exist():
    used: dict[str, set[str]] = {}
    for page in PAGES:
        for match in COMMAND.finditer(page.read_text()):
            options = re.findall(r"(?<=\s)--[a-z][a-z-]+", match["rest"].partition("#")[0])
            used.setdefault(match["command"], set()).update(options)
    assert len(used) >= 8
    for command, options in used.items():
        nouns = {"schedule": ("apply",), "registry": ("list", "show", "promote", "rollback")}.get(command)
        helps = [[command, noun, "--help"] for noun in nouns] if nouns else [[command, "--help"]]
        text = ""
        for arguments in helps:
            done = subprocess.run([sys.executable, "-m", "pipelines", *arguments], cwd=REPOSITORY, capture_output=True,
                                  text=True)  # fmt: skip
            assert done.returncode == 0, done.stderr
            text += done.stdout
        known = set(re.findall(r"--[a-z][a-z-]+", text))
        assert options <= known, (command, options - known)


def setting_names(kind: Any) -> Iterator[str]:
    """Every key that a section may hold, and those of the sections in it."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for name, field in kind.model_fields.items():
            yield name
            yield from setting_names(field.annotation)
    for part in get_args(kind):
        yield from setting_names(part)


def test_every_setting_is_on_a_page():
    written = set(re.findall(r"\w+", "\n".join(page.read_text() for page in PAGES)))
    names = set(setting_names(RunConfig))
    assert len(names) > 150
    assert names <= written, names - written


def test_task_and_reward_of_the_page_work(tmp_path, monkeypatch):
    page = (REPOSITORY / "docs" / "task.md").read_text()
    task, own = re.findall(r"```toml\n(.*?)```", page, re.S)
    [code] = re.findall(r"```python\n# my_rewards.py\n(.*?)```", page, re.S)
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    rewards = TaskSettings.model_validate(tomllib.loads(task)["task"]).rewards
    scorer = build_scorer([*rewards, *(RewardSettings(**reward) for reward in tomllib.loads(own)["task"]["rewards"])])

    row = Example(id="row", messages=[], answer="72", completion="", reward_kind="", metadata={})
    assert scorer.score(row, "6 * 12\n\\boxed{72}.").parts == {"numeric": 1.0, "boxed": 1.0, "python": 0.0}
    assert scorer.score(row, "it is 72").parts == {"numeric": 1.0, "boxed": 0.0, "python": 0.5}
    assert scorer.score(row, "72").parts["python"] == 1.0
    kinds = set(get_args(RewardSettings.model_fields["kind"].annotation))
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == kinds


def test_config_of_the_first_run_on_kubeflow(tmp_path):
    [block] = re.findall(r"```toml\n(.*?)```", (REPOSITORY / "docs" / "kubeflow.md").read_text(), re.S)
    ours = (REPOSITORY / "configs" / "cluster.toml").read_text().partition("[cluster]")[0]
    cluster = block[block.index("[cluster]") :].replace("sha256:…", f"sha256:{'0' * 64}")
    (tmp_path / "my.toml").write_text(ours.replace("s3://tuneloop/", "s3://bucket/") + cluster)
    config = load_run_config(tmp_path / "my.toml")
    assert config.cluster.train_image.startswith("registry.example/tuneloop/train@sha256:")
    shown = block[: block.index("[cluster]")]
    for value in (
        config.check.gpu,
        config.data_prep.sources[0].uri,
        config.promote.registry,
        config.promote.adapter_name,
    ):
        assert f'"{value}"' in shown
