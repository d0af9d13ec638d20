"""`python -m pipelines registry …`: tables for people, JSON for machines, one line for mistakes."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.cli import main
from tuneloop.registry import Registry

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _keep_signal_handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(str(tmp_path / "registry"))
    for number, value in ((1, 0.5), (2, 0.75), (3, 0.8)):
        folder = tmp_path / f"adapter-{number}"
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_text(str(number))
        accuracy = {"candidate": {"value": value, "n": 64, "ci95": [value - 0.1, value + 0.1]}}
        registry.register("sums", folder, {
            "adapter_digest": f"{number}" * 64, "base_uri": "bundled://base", "parent": number - 1 or None,
            "evaluation": {"accuracy": accuracy, "gate": {"passed": True, "reason": "better"}},
        })  # fmt: skip
        registry.promote("sums", number, "production", number - 1 or None)
    return registry


def run(registry: Registry, *arguments: str) -> int:
    return main(["registry", arguments[0], "--registry", registry.uri, *arguments[1:]])


def test_list(registry, capsys):
    assert run(registry, "list") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["ADAPTER", "VERSION", "ALIASES", "ACCURACY", "PARENT", "CREATED", "DIGEST"]
    assert lines[1][:5] == ["sums", "1", "-", "50.0%", "-"]
    assert lines[3][:5] == ["sums", "3", "production", "80.0%", "2"]
    assert lines[3][6] == "3" * 12
    assert run(registry, "list", "--json", "--name", "sums") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["version"], row["aliases"]) for row in rows] == [(1, []), (2, []), (3, ["production"])]
    assert run(Registry(registry.uri + "-empty"), "list") == 0
    assert "no adapters yet" in capsys.readouterr().out


def test_a_damaged_version_is_a_row_of_the_list(registry, capsys):
    (Path(registry.uri) / "sums/versions/2/version.json").write_text("{")
    assert run(registry, "list") == 0
    damaged = capsys.readouterr().out.splitlines()[2]
    assert "damaged:" in damaged
    assert run(registry, "show", "--version", "2") == 2


def test_show(registry, capsys):
    assert run(registry, "show") == 0
    shown = capsys.readouterr().out
    assert "production" in shown
    assert "80.0%  (70.0% to 90.0%, 64 prompts)" in shown
    assert run(registry, "show", "--version", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == registry.show("sums", 1).record


def test_rollback_and_promote(registry, capsys):
    assert run(registry, "rollback") == 0
    assert capsys.readouterr().out == "sums production: version 2, was 3\n"
    assert run(registry, "rollback", "--json") == 0
    moved = json.loads(capsys.readouterr().out)
    assert (moved["adapter_name"], moved["alias"], moved["version"], moved["previous"]) == (
        "sums",
        "production",
        1,
        None,
    )
    assert run(registry, "promote", "--version", "3") == 0
    assert capsys.readouterr().out == "sums production: version 3, was 1\n"
    assert run(registry, "promote", "--version", "3") == 0
    assert capsys.readouterr().out == "sums production: already version 3\n"
    assert run(registry, "promote", "--version", "2", "--alias", "canary") == 0
    assert registry.alias("sums", "canary").version == 2
    assert registry.alias("sums").version == 3


def test_mistakes_are_one_line_and_exit_2(registry, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    cases = {
        "has no version 9; it has: 1, 2, 3": (registry, "promote", "--version", "9"),
        "has no version 0; it has: 1, 2, 3": (registry, "show", "--version", "0"),
        "has no alias 'canary'; it has: production": (registry, "rollback", "--alias", "canary"),
        "has no alias 'canary2'; it has: production": (registry, "show", "--alias", "canary2"),
        "holds no adapter 'mats'; it holds: sums": (registry, "list", "--name", "mats"),
        "not a name for an adapter": (registry, "show", "--name", "../sums"),
        "holds no adapters": (Registry(str(tmp_path / "none")), "rollback"),
    }
    for message, arguments in cases.items():
        assert run(*arguments) == 2
        output = capsys.readouterr()
        assert message in output.err
        assert len(output.err.splitlines()) == 1
        assert output.out == ""
    assert main(["registry", "list", "--registry", str(tmp_path / "file")]) == 2
    assert main(["registry", "list", "--registry", "gs://bucket"]) == 2
    assert run(registry, "rollback") == run(registry, "rollback") == 0
    capsys.readouterr()
    assert run(registry, "rollback") == 2
    assert "nothing to go back to" in capsys.readouterr().err


def test_several_adapters_need_a_name(registry, tmp_path, capsys):
    registry.register("other", tmp_path / "adapter-1", {"adapter_digest": "x", "parent": None})
    assert run(registry, "rollback") == 2
    assert "holds 2 adapters (other, sums); choose one by --name" in capsys.readouterr().err
    assert run(registry, "rollback", "--name", "sums") == 0


def test_neither_torch_nor_kfp_is_imported(registry):
    code = (
        "import sys; from pipelines.cli import main; main(sys.argv[1:]); "
        "print([name for name in ('torch', 'kfp', 'boto3') if name in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "registry", "list", "--registry", registry.uri]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert child.stderr == "[]\n"
