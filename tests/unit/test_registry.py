"""Versions are immutable and whole, aliases move by compare-and-swap, and every mistake is one clear line."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.s3_server import BUCKET, s3_server  # noqa: F401
from tuneloop.errors import UserError
from tuneloop.registry import AliasMoved, Registry
from tuneloop.storage import LocalStorage


@pytest.fixture(params=["local", "s3"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    if request.param == "local":
        return Registry(str(tmp_path / "registry"))
    request.getfixturevalue("s3_server")
    return Registry(f"s3://{BUCKET}/registry")


@pytest.fixture
def local(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "registry"))


def adapter(tmp_path: Path, content: str) -> Path:
    folder = tmp_path / f"adapter-{content}"
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(content.encode() * 1000)
    return folder


def register(registry: Registry, tmp_path: Path, content: str, parent: int | None = None, name: str = "math"):
    record = {"adapter_digest": f"digest {content}", "parent": parent, "base_uri": "bundled://base"}
    return registry.register(name, adapter(tmp_path, content), record)


def test_a_version_is_registered_shown_and_fetched(registry, tmp_path):
    assert registry.names() == []
    assert registry.list() == []
    version = register(registry, tmp_path, "a")
    assert version.version == 1
    assert version.record["adapter_name"] == "math"
    assert version.record["base_uri"] == "bundled://base"
    assert sorted(version.record["files"]) == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    fetched = registry.show("math", 1).fetch_adapter(tmp_path / "fetched")
    assert (fetched / "adapter_model.safetensors").read_bytes() == b"a" * 1000
    assert sorted(path.name for path in fetched.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert registry.show("math", 1).fetch_adapter(tmp_path / "fetched") == fetched
    (fetched / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="in the way"):
        registry.show("math", 1).fetch_adapter(tmp_path / "fetched")


def test_numbers_count_up_and_the_same_adapter_is_registered_once(registry, tmp_path):
    assert [register(registry, tmp_path, content).version for content in "abcab"] == [1, 2, 3, 1, 2]
    assert register(registry, tmp_path, "a", name="other").version == 1
    assert [(row.adapter_name, row.version) for row in registry.list()] == [
        ("math", 1), ("math", 2), ("math", 3), ("other", 1)]  # fmt: skip
    assert registry.names() == ["math", "other"]


def test_promote_resolve_and_roll_back(registry, tmp_path):
    assert registry.resolve("math", "production") is None
    first = register(registry, tmp_path, "a")
    registry.promote("math", 1, "production", None)
    second = register(registry, tmp_path, "b", parent=1)
    registry.promote("math", 2, "production", 1)
    register(registry, tmp_path, "c", parent=2)
    moved = registry.promote("math", 3, "production", 2)
    assert (moved.version, moved.previous) == (3, 2)
    assert registry.resolve("math").version == 3
    assert [row.aliases for row in registry.list("math")] == [(), (), ("production",)]
    assert registry.rollback("math").version == second.version
    assert registry.rollback("math").version == first.version
    with pytest.raises(UserError, match="nothing to go back to"):
        registry.rollback("math")
    assert registry.resolve("math").record == first.record


def test_an_alias_that_someone_else_moved_is_left_alone(registry, tmp_path):
    for content in "abc":
        register(registry, tmp_path, content)
    registry.promote("math", 1, "production", None)
    registry.promote("math", 2, "production", 1)
    with pytest.raises(
        AliasMoved, match=r"now names version 2 \(moved by .+@.+ at 2.+Z\), expected version 1; nothing"
    ):
        registry.promote("math", 3, "production", 1)
    with pytest.raises(AliasMoved, match="expected no such alias yet"):
        registry.promote("math", 3, "production", None)
    with pytest.raises(AliasMoved, match="does not exist any more"):
        registry.promote("math", 3, "canary", 1)
    assert registry.alias("math").version == 2
    assert registry.promote("math", 2, "production", 1).version == 2  # the retry of a promotion that was made


def test_of_racing_promotions_one_wins(registry, tmp_path):
    for content in "abcd":
        register(registry, tmp_path, content)
    barrier = threading.Barrier(4)

    def promote(version: int) -> int:
        barrier.wait()
        try:
            return registry.promote("math", version, "production", None).version
        except AliasMoved:
            return 0

    with ThreadPoolExecutor(4) as pool:
        winners = [version for version in pool.map(promote, (1, 2, 3, 4)) if version]
    assert winners == [registry.alias("math").version]


def test_racing_registrations_get_numbers_of_their_own_and_equal_ones_share(registry, tmp_path):
    barrier = threading.Barrier(8)

    folders = {content: adapter(tmp_path, content) for content in "abcd"}

    def race(content: str) -> tuple[str, int]:
        barrier.wait()
        return content, registry.register("math", folders[content], {"adapter_digest": content}).version

    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(race, "abcdabcd"))
    assert sorted(version for _, version in results) == [1, 2, 3, 4]
    for content, version in results:
        fetched = registry.show("math", version).fetch_adapter(tmp_path / f"fetched-{version}")
        assert (fetched / "adapter_model.safetensors").read_bytes() == content.encode() * 1000


def _register_and_die(uri: str, tmp_path: Path, content: str, puts: int) -> None:
    """Register, and be gone after so many puts."""
    registry = Registry(uri)

    def dying(put):
        def counted(*arguments, **named):
            nonlocal puts
            if puts == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            puts -= 1
            return put(*arguments, **named)

        return counted

    for method in ("put_file", "write_bytes"):
        setattr(registry.storage, method, dying(getattr(registry.storage, method)))
    register(registry, tmp_path, content)


@pytest.mark.parametrize("puts", range(5))  # claim, its proof, two files, version.json
def test_a_killed_registration_is_invisible_and_blocks_nobody(local, tmp_path, puts):
    register(local, tmp_path, "a")
    context = multiprocessing.get_context("fork")
    child = context.Process(target=_register_and_die, args=(local.uri, tmp_path, "b", puts))
    child.start()
    child.join()
    assert child.exitcode == -9
    assert local.versions("math") == [1]
    with pytest.raises(UserError, match=r"no version 2; it has: 1$"):
        local.show("math", 2)
    other = register(local, tmp_path, "c")
    assert other.version == (2 if puts == 0 else 3)
    again = register(local, tmp_path, "b")
    assert again.version == (3 if puts == 0 else 2)
    assert again.fetch_adapter(tmp_path / "b").is_dir()
    assert register(local, tmp_path, "d").version == 4


def test_a_server_that_ignores_conditions_is_refused(s3_server, tmp_path):  # noqa: F811
    s3_server.ignore_conditions = {"IF_MATCH", "IF_NONE_MATCH"}
    registry = Registry(f"s3://{BUCKET}/registry")
    with pytest.raises(UserError, match="ignores If-None-Match"):
        register(registry, tmp_path, "a")
    assert registry.names() == []


def test_a_server_that_ignores_if_match_moves_no_alias(s3_server, tmp_path):  # noqa: F811
    registry = Registry(f"s3://{BUCKET}/registry")
    first, second = register(registry, tmp_path, "a"), register(registry, tmp_path, "b")
    registry.promote("math", first.version, "production", None)
    s3_server.ignore_conditions = {"IF_MATCH", "IF_NONE_MATCH"}
    with pytest.raises(UserError, match="ignores If-Match"):
        registry.promote("math", second.version, "production", first.version)
    assert registry.alias("math").version == first.version


def test_unknown_names_say_what_there_is(registry, tmp_path):
    with pytest.raises(UserError, match="holds no adapter 'math'; it holds: none yet"):
        registry.show("math", 1)
    register(registry, tmp_path, "a")
    with pytest.raises(UserError, match="holds no adapter 'mats'; it holds: math"):
        registry.list("mats")
    with pytest.raises(UserError, match="math has no version 7; it has: 1"):
        registry.promote("math", 7, "production", None)
    with pytest.raises(UserError, match="math has no alias 'production'; it has: none yet"):
        registry.rollback("math")
    registry.promote("math", 1, "canary", None)
    with pytest.raises(UserError, match="math has no alias 'production'; it has: canary"):
        registry.rollback("math")
    with pytest.raises(UserError, match="holds no adapter 'mats'"):
        registry.rollback("mats")


@pytest.mark.parametrize("name", ["", "../x", "Upper", "a/b", ".hidden", "-x", "x" * 64, "new\nline"])
def test_names_are_checked(local, tmp_path, name):
    with pytest.raises(UserError, match="not a name for an adapter"):
        local.register(name, adapter(tmp_path, "a"), {"adapter_digest": "x"})
    with pytest.raises(UserError, match="not a name for an adapter"):
        local.resolve(name, "production")
    with pytest.raises(UserError, match="not a name for an alias"):
        local.resolve("math", name)
    assert not Path(local.uri).exists()


def test_no_adapter_to_register(local, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        local.register("math", tmp_path / "gone", {"adapter_digest": "x"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no adapter"):
        local.register("math", tmp_path / "empty", {"adapter_digest": "x"})
    assert not Path(local.uri).exists()


def test_a_registry_that_is_a_file(tmp_path):
    (tmp_path / "registry").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        Registry(str(tmp_path / "registry"))


@pytest.mark.parametrize("damage", ["text", "truncated", "other version", "no files"])
def test_a_damaged_record_is_one_line_and_stops_nobody_else(local, tmp_path, capsys, damage):
    register(local, tmp_path, "a")
    path = Path(local.uri) / "math/versions/1/version.json"
    record = json.loads(path.read_text())
    if damage == "text":
        path.write_text("{oops")
    elif damage == "truncated":
        path.write_bytes(b"")
    else:
        changed = {**record, "version": 2} if damage == "other version" else {**record, "files": {}}
        path.write_text(json.dumps(changed))
        path.with_name(".version.json.sha256").unlink()  # as after a restore that got it wrong
    with pytest.raises(UserError, match=r"versions/1/version.json"):
        local.show("math", 1)
    assert register(local, tmp_path, "b").version == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    rows = local.list("math")
    assert [(row.version, bool(row.problem)) for row in rows] == [(1, True), (2, False)]


@pytest.mark.parametrize("damage", ["flip", "missing", "replaced"])
def test_files_that_do_not_match_are_neither_fetched_nor_promoted(local, tmp_path, damage):
    register(local, tmp_path, "a")
    folder = Path(local.uri) / "math/versions/1/adapter"
    victim = folder / "adapter_model.safetensors"
    if damage == "flip":
        victim.write_bytes(b"b" * 1000)
    elif damage == "missing":
        victim.unlink()
    else:
        LocalStorage(folder).write_bytes(victim.name, b"b" * 1000)  # with a fitting sidecar
    version = local.show("math", 1)
    with pytest.raises(UserError, match=r"adapter_model.safetensors"):
        version.fetch_adapter(tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    with pytest.raises(UserError, match=r"adapter_model.safetensors"):
        local.promote("math", 1, "production", None)
    assert local.resolve("math") is None


def test_a_version_without_files_is_damaged(local, tmp_path):
    version = register(local, tmp_path, "a")
    shutil.rmtree(Path(local.uri) / "math/versions/1/adapter")
    with pytest.raises(UserError, match="is missing"):
        version.fetch_adapter(tmp_path / "fetched")


@pytest.mark.parametrize("content", ['{"version": "two"}', "[]", "", '{"version": 1'])
def test_a_damaged_alias_is_one_line(local, tmp_path, content):
    register(local, tmp_path, "a")
    local.promote("math", 1, "production", None)
    path = Path(local.uri) / "math/aliases/production.json"
    path.write_text(content)
    path.with_name(".production.json.sha256").unlink()
    for action in (lambda: local.resolve("math"), lambda: local.rollback("math"), lambda: local.list("math")):
        with pytest.raises(UserError, match=r"production.json"):
            action()


def test_what_was_fetched_from_a_local_registry_can_be_registered_elsewhere(local, tmp_path):
    register(local, tmp_path, "a")
    other = Registry(str(tmp_path / "other"))
    stored = Path(local.uri) / "math/versions/1/adapter"  # with its sidecars
    copied = other.register("math", stored, {"adapter_digest": "digest a", "parent": None})
    assert copied.record["files"] == local.show("math", 1).record["files"]
