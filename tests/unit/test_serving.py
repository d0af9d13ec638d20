"""The follower keeps vLLM on the version that the alias names, and nothing that goes wrong takes away what is served.

The registry is a real one; vLLM is a double of its endpoints, and tests/e2e/test_vllm_server.py asks the real one.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.s3_server import BUCKET, S3Server, s3_server  # noqa: F401
from tests.vllm_double import VllmDouble, vllm_double  # noqa: F401
from tuneloop.registry import Registry
from tuneloop.serving import alias_follower
from tuneloop.serving.__main__ import main, wait, wait_seconds
from tuneloop.serving.alias_follower import AliasFollower, Status
from tuneloop.serving.readiness import Readiness
from tuneloop.serving.vllm_server import VllmServer

BASE = "bundled://base"


class Served:
    """A registry, a double of vLLM and a follower between them."""

    def __init__(self, uri: str, double: VllmDouble, folder: Path):
        self.registry, self.double, self.folder, self._made = Registry(uri), double, folder / "served", folder / "made"
        self.follower = self.new_follower()

    def new_follower(self, base: str = BASE, key: str = "") -> AliasFollower:
        server = VllmServer(self.double.url, key, timeout=10)
        return AliasFollower(self.registry, "math", "production", server, self.folder, base)

    def register(self, content: str, rank: int = 8, base: str = BASE) -> int:
        folder = self._made / content
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
        (folder / "adapter_model.safetensors").write_bytes(content.encode() * 1000)
        record = {"adapter_digest": f"sha256:{content}", "parent": None, "base_uri": base}
        return self.registry.register("math", folder, record).version

    def promote(self, version: int) -> None:
        known = self.registry.aliases("math").get("production")
        self.registry.promote("math", version, "production", known.version if known else None)

    @property
    def content(self) -> str:
        """The weights in the folder that vLLM was given for the adapter's name."""
        return (Path(self.double.adapters["math"]) / "adapter_model.safetensors").read_text()[0]


@pytest.fixture
def served(tmp_path: Path, vllm_double: VllmDouble) -> Served:  # noqa: F811
    return Served(str(tmp_path / "registry"), vllm_double, tmp_path)


def test_moving_the_alias_switches_the_adapter(served: Served):
    first, second = served.register("a"), served.register("b")
    served.promote(first)
    assert served.follower.look() == Status(1, 1)
    assert served.content == "a"
    assert served.follower.look() == Status(1, 1)
    assert served.double.calls == [f"load math {Path(served.double.adapters['math']).name}"]  # once, not at every look

    served.promote(second)
    assert served.follower.look() == Status(2, 2)
    assert served.content == "b"
    served.registry.rollback("math")
    assert served.follower.look() == Status(1, 1)
    assert served.content == "a"


def test_a_version_that_vllm_refuses_leaves_the_one_before(served: Served, monkeypatch: pytest.MonkeyPatch):
    served.promote(served.register("a"))
    served.follower.look()
    served.promote(served.register("b", rank=128))
    status = served.follower.look()
    assert (status.wanted, status.served, served.content) == (2, 1, "a")
    assert re.fullmatch(r"vLLM refuses 2-\w+: LoRA rank 128 is greater than max_lora_rank 64\.", status.problem)
    assert served.follower.is_served()

    calls = len(served.double.calls)
    assert served.follower.look() == status  # said again, not asked again
    assert len(served.double.calls) == calls
    monkeypatch.setattr(alias_follower.time, "monotonic", lambda: 1e12)
    served.double.largest_rank = 128
    assert served.follower.look() == Status(2, 2)

    served.promote(served.register("c", rank=256))
    assert served.follower.look().served == 2
    served.promote(served.register("d"))  # another version is not held up by it
    assert served.follower.look() == Status(4, 4)


def test_an_adapter_of_another_base_is_refused(served: Served):
    served.promote(served.register("a"))
    served.follower.look()
    served.promote(served.register("b", base="hf://other/base"))
    status = served.follower.look()
    assert status.served == 1
    assert status.problem == ("math version 2 was trained on hf://other/base, but bundled://base is served; serve that "
                              "base, or move the alias back")  # fmt: skip
    assert served.new_follower(base="").look() == Status(2, 2)


def test_a_vllm_that_is_started_again_gets_the_adapter_again(served: Served):
    served.promote(served.register("a"))
    served.follower.look()
    served.double.start_again()
    assert not served.follower.is_served()
    assert served.follower.look() == Status(1, 1)
    assert served.content == "a"


def test_without_the_registry_the_last_version_is_served_whoever_is_started_again(served: Served):
    served.promote(served.register("a"))
    served.follower.look()
    alias = Path(served.registry.uri) / "math/aliases/production.json"
    alias.write_text("{}")
    status = served.follower.look()
    assert status.served == 1
    assert "differs from the checksum" in status.problem
    served.double.start_again()
    restarted = served.new_follower().look()
    assert (restarted.wanted, restarted.served, served.content) == (None, 1, "a")


def break_registry(served: Served) -> None:
    (Path(served.registry.uri) / "math/aliases/production.json").write_text("{}")


def test_what_was_made_for_another_base_is_not_held(served: Served):
    """The folder outlives the server: started again on another base, it would take the weights and answer nonsense."""
    served.promote(served.register("a"))
    served.follower.look()
    served.double.start_again()
    status = served.new_follower(base="hf://other/base").look()
    assert (status.wanted, status.served) == (1, None)
    assert served.double.adapters == {}


def test_what_was_damaged_on_the_disk_is_not_held(served: Served):
    served.promote(served.register("a"))
    served.follower.look()
    (Path(served.double.adapters["math"]) / "adapter_model.safetensors").write_bytes(b"x")
    break_registry(served)
    served.double.start_again()
    assert served.new_follower().look().served is None
    assert served.double.adapters == {}


def test_a_switch_whose_answer_was_lost_is_remembered_too(served: Served):
    served.promote(served.register("a"))
    served.follower.look()
    served.promote(served.register("b"))
    served.double.silent = True
    assert served.follower.look().waiting
    assert served.content == "b"
    served.double.silent = False
    assert served.follower.look() == Status(2, 2)
    break_registry(served)
    served.double.start_again()
    assert served.new_follower().look().served == 2


def test_a_server_with_nothing_to_lose_is_asked_again_at_once(served: Served):
    """It may have refused because it was about to die; the next one takes what this one did not."""
    served.promote(served.register("a"))
    served.double.largest_rank = 1
    assert "greater than max_lora_rank" in served.follower.look().problem
    served.double.largest_rank = 64
    assert served.follower.look() == Status(1, 1)


def test_a_long_wait_ends_when_the_adapter_is_no_longer_served():
    stop, started = threading.Event(), time.monotonic()
    wait(stop, 0.02, 60.0, lambda: False)
    assert time.monotonic() - started < 30
    asked = []
    wait(stop, 0.02, 0.1, lambda: asked.append(1) or True)
    assert time.monotonic() - started >= 0.12
    assert asked


def test_an_unavailable_object_store_is_said_and_held_out(
    tmp_path: Path,
    vllm_double: VllmDouble,  # noqa: F811
    s3_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    served = Served(f"s3://{BUCKET}/registry", vllm_double, tmp_path)
    served.promote(served.register("a"))
    assert served.follower.look() == Status(1, 1)
    s3_server.refuse = {("GET", 503, "SlowDown"): 1}
    status = served.follower.look()
    assert (status.wanted, status.served, status.waiting) == (None, 1, False)
    assert "storage is unavailable (503" in status.problem
    served.promote(served.register("b"))
    s3_server.cut_bodies, s3_server.cut_share = 40, 0.0  # every download of the new version breaks
    assert served.follower.look().served == 1
    s3_server.reset()
    assert served.follower.look() == Status(2, 2)
    assert served.content == "b"


def test_what_was_damaged_on_the_way_or_on_the_disk_is_not_served(served: Served):
    served.promote(served.register("a"))
    served.follower.look()
    version = served.register("b")
    served.promote(version)
    stored = Path(served.registry.uri) / f"math/versions/{version}/adapter/adapter_model.safetensors"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + b"x")
    status = served.follower.look()
    assert status.served == 1
    assert "adapter_model.safetensors: differs from the checksum" in status.problem
    stored.write_bytes(whole)
    served.follower.look()
    assert served.content == "b"

    here = Path(served.double.adapters["math"]) / "adapter_model.safetensors"
    here.write_bytes(b"x")
    served.double.start_again()
    assert served.follower.look() == Status(2, 2)
    assert here.read_bytes() == whole


def test_only_the_version_served_and_the_one_before_are_kept(served: Served):
    for content in "abcd":
        served.promote(served.register(content))
        served.follower.look()
    assert sorted(path.name.partition("-")[0] for path in (served.folder / "math").iterdir() if path.is_dir()) == [
        "3",
        "4",
    ]


def test_before_the_first_promotion_nothing_is_served_and_why_is_said(served: Served):
    served.register("a")
    status = served.follower.look()
    assert (status.wanted, status.served) == (None, None)
    assert status.problem.endswith("math has no alias 'production' yet; promote a version")
    assert not served.follower.is_served()


def test_a_key_and_a_server_without_the_endpoints_are_said_clearly(served: Served):
    served.promote(served.register("a"))
    served.double.key = "right"
    assert "refuses the key; set VLLM_API_KEY" in served.follower.look().problem
    assert served.new_follower(key="right").look() == Status(1, 1)
    served.double.key, served.double.updating = "", False
    served.double.start_again()
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True" in served.follower.look().problem


def test_a_server_that_is_closed_to_other_machines_says_where_to_follow_it(served: Served, monkeypatch):
    served.promote(served.register("a"))
    refusal = (403, {"error": {"message": "open to this machine only; others reach /health", "code": 403}})
    monkeypatch.setattr(served.double, "load", lambda *_: refusal)
    why = "open to this machine only; others reach /health"
    told = f"{served.double.url}: forbids /v1/load_lora_adapter ({why}); follow vLLM where it runs"
    assert served.follower.look().problem == told


def test_a_server_that_does_not_answer_is_waited_for(served: Served):
    served.promote(served.register("a"))
    served.double.close()
    status = served.follower.look()
    assert status.waiting
    assert "does not answer" in status.problem


def test_ready_means_that_the_name_is_answered_at_this_moment(served: Served):
    served.promote(served.register("a"))

    def ready() -> int:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{readiness.port}/ready", timeout=10) as answer:
                assert json.load(answer) == {"wanted": 1, "served": 1, "problem": "", "waiting": False}
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    with Readiness(0, served.follower.is_served, "127.0.0.1") as readiness:
        assert ready() == 503
        readiness.status = served.follower.look()
        assert ready() == 200
        served.double.start_again()
        assert ready() == 503


def test_failures_in_a_row_are_asked_about_ever_less_often():
    assert [wait_seconds(15, failures) for failures in (0, 1, 2, 4, 5, 1000)] == [15, 30, 60, 240, 300, 300]
    assert wait_seconds(600, 3) == 600


def test_the_command_follows_until_it_is_told_to_stop_and_needs_neither_torch_nor_kfp(served: Served, tmp_path: Path):
    served.promote(served.register("a"))
    code = (
        "import sys; from tuneloop.serving.__main__ import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'kfp', 'transformers', 'vllm'} & set(sys.modules), 'heavy'; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "follow", "--registry", served.registry.uri, "--adapter", "math", "--server",
               served.double.url, "--folder", str(tmp_path / "here"), "--interval", "0.05", "--port", "0"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_until(lambda: "math" in served.double.adapters)
        served.promote(served.register("b"))
        wait_until(lambda: served.content == "b")
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, output
    lines = output.splitlines()
    assert lines[0].startswith("following math production in ")
    assert lines[-2:] == ["math: version 1 is served", "math: version 2 is served"]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["follow", "--registry", "ftp://x/y", "--adapter", "math"], "only local paths"),
        (["follow", "--registry", "registry", "--adapter", "No Name"], "not a name for an adapter"),
        (["follow", "--registry", "registry", "--adapter", "math", "--interval", "0"], "0.01 to 3600"),
        (["fetch-base", "--model", "hf://nobody", "--to", "base"], "hf://organisation/name"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as error:
        code = error.code
    printed = capfd.readouterr()
    assert code == 2
    assert message in printed.err
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_base_is_fetched_once_and_pointed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tmp_path / "model"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (source / name).write_text("{}")
    link = tmp_path / "models/base"
    for _ in range(2):
        assert main(["fetch-base", "--model", str(source), "--to", str(link)]) == 0
    assert link.is_symlink()
    assert (link / "config.json").is_file()
    shutil.rmtree(link.parent)
    link.mkdir(parents=True)
    assert main(["fetch-base", "--model", str(source), "--to", str(link)]) == 2
    assert os.listdir(link) == []
