"""What the pages say can be done: links lead somewhere, commands, options and settings exist, examples work."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from pydantic import BaseModel

from components.config import RunConfig, load_run_config
from components.step_command import main as step_main
from pipelines.cluster.schedules import ScheduleFile
from pipelines.steps import STEP_NAMES
from tuneloop.data.schema import Example
from tuneloop.report.run_record import RunRecord
from tuneloop.rewards.base import build_scorer
from tuneloop.settings import RewardSettings, TaskSettings

REPOSITORY = Path(__file__).resolve().parents[2]
TRACKED = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
FOLDERS = ("", "docs/", "components/*/", "images/", "benchmarks/", "examples/", "manifests/", "manifests/components/*/")
PAGES = [REPOSITORY / name for name in TRACKED] or sorted(  # a copy of the tree is no repository
    page for folder in FOLDERS for page in REPOSITORY.glob(f"{folder}*.md")
)
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


def unknown_keys(table: dict[str, Any], kinds: list[type[BaseModel]]) -> Iterator[str]:
    """The keys of a TOML table that none of the models it may be read as has."""
    for key, value in table.items():
        fields = [kind.model_fields[key].annotation for kind in kinds if key in kind.model_fields]
        inner = [model for field in fields for model in models_in(field)]
        if not fields:
            yield key
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict) and inner:
                yield from unknown_keys(part, inner)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_settings_of_examples_exist(page):
    for block in re.findall(r"```toml\n(.*?)```", page.read_text(), re.S):
        kind = ScheduleFile if "# schedules.toml" in block else RunConfig
        assert list(unknown_keys(tomllib.loads(block), [kind])) == [], block


def tables_of_settings() -> Iterator[tuple[str, str, str]]:
    """(section, its settings, their defaults) of each row of the tables that are headed by a section's name."""
    for page in PAGES:
        for table in re.findall(r"^\| `\[[\w.]+\]` \| default \|.*\n(?:\|.*\n)+", page.read_text(), re.M):
            header, _, *rows = table.splitlines()
            section = header.split("`")[1].strip("[]")
            for row in rows:
                settings, defaults, *_ = row.strip("|").split(" | ")
                yield section, settings, defaults


def defaults_of(section: str, setting: str) -> list[Any]:
    """What a setting is when it is not given, in each of the models that it may be read as."""
    kinds: list[type[BaseModel]] = [RunConfig]
    *parents, name = f"{section}.{setting}".split(".")
    for parent in parents:
        kinds = [model for kind in kinds if parent in kind.model_fields
                 for model in models_in(kind.model_fields[parent].annotation)]  # fmt: skip
    fields = [kind.model_fields[name] for kind in kinds if name in kind.model_fields]
    assert fields, f"there is no setting {section}.{setting}"
    return [field.get_default(call_default_factory=True) for field in fields]


def written_values(text: str) -> list[Any]:
    """The numbers, quoted texts and truth values of a table's cell; None for what is said in words."""
    values: list[Any] = []
    for word in re.sub(r"[;:] .*", "", text.strip()).split(", "):
        number = word.replace(",", "")
        if re.fullmatch(r"-?[\d.]+(e-?\d+)?", number):
            values.append(float(number))
        else:
            values.append({"true": True, "false": False}.get(word, word[2:-2] if word.startswith('`"') else None))
    return values


def test_defaults_of_the_pages_are_those_of_the_settings():
    compared = 0
    for section, settings, defaults in tables_of_settings():
        names, values = re.findall(r"`([\w.]+)`", settings), written_values(defaults)
        for name, written in zip(names, values, strict=False):  # one word for several settings is no value
            found = defaults_of(section, name)
            if written is not None and not isinstance(found[0], BaseModel):  # a section's is told in its own words
                compared += 1
                assert written in found, f"{section}.{name} is {found}, the page says {written}"
    assert compared > 60


def test_modules_that_are_run_exist():
    used = {name for page in PAGES for name in re.findall(r"python -m ([a-z][\w.]*\w)", page.read_text())}
    ours = {name for name in used if (REPOSITORY / name.partition(".")[0]).is_dir()}
    assert len(ours) > 12
    for name in ours - {"components"}:  # as in components.<step>
        file = REPOSITORY / name.replace(".", "/")
        assert file.with_suffix(".py").is_file() or (file / "__main__.py").is_file(), name


@pytest.mark.parametrize("step", [*STEP_NAMES, "report"])
def test_help_of_a_step_is_for_who_runs_it(step, capsys):
    command = importlib.import_module(f"components.{step}.step")
    with pytest.raises(SystemExit) as left:
        command.main(["--help"]) if step == "report" else step_main(command.STEP, ["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert not re.search(r"\b(Args|Returns|Raises):", shown), shown


def test_report_of_the_newest_run(tmp_path):
    for seconds, name in enumerate(("newest", "older"), start=1):
        (tmp_path / "runs" / name).mkdir(parents=True)
        os.utime(tmp_path / "runs" / name, (10**9 - seconds, 10**9 - seconds))
    for given, expected in (((), "runs/newest/"), (("RUN=mine",), "mine")):
        make = [
            "make",
            "--dry-run",
            "--no-print-directory",
            "--file",
            REPOSITORY / "Makefile",
            "--old-file",
            "setup",
            "report",
            *given,
        ]
        ours = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # make test runs this
        done = subprocess.run(make, cwd=tmp_path, env=ours, capture_output=True, text=True)
        assert done.stdout.split()[-4:] == ["-m", "pipelines", "report", expected], done


def test_every_status_is_on_its_pages():
    for name in get_args(get_type_hints(RunRecord.status.fget)["return"]):
        assert f'"{name}"' in (REPOSITORY / "docs" / "report.md").read_text()
        assert f"`{name}`" in (REPOSITORY / "docs" / "formats.md").read_text()


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
