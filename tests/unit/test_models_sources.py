"""resolve_model: every scheme, and the one clear line when a model cannot be had."""

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.s3_server import BUCKET, S3Server, s3_server  # noqa: F401
from tuneloop.errors import TryAgain, UserError
from tuneloop.models.cache import cached_folder
from tuneloop.models.sources import INDEX, resolve_model
from tuneloop.storage import open_storage

TINY = "tiny://qwen2?hidden_size=16&layers=1&heads=2&kv_heads=1&intermediate_size=16"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model(TINY, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_a_local_folder_is_itself(copied, tmp_path):
    assert resolve_model(str(copied), tmp_path) == copied
    assert resolve_model(copied.as_uri(), tmp_path) == copied


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("ftp://host/model", r"ftp://host/model: unknown kind of model; .*bundled://, file://, hf://, s3://, tiny://"),
        ("tiny://llama", r"unknown architecture; known: qwen2"),
        ("tiny://qwen2?size=4", r"unknown option 'size'; known: seed, hidden_size, layers"),
        ("tiny://qwen2?layers=two", r"layers must be a whole number, not 'two'"),
        ("tiny://qwen2?layers=0", r"layers must be between 1 and 64"),
        ("tiny://qwen2?hidden_size=60&heads=8", r"hidden_size must be an even multiple of heads \(8\)"),
        ("tiny://qwen2?kv_heads=3", r"heads \(4\) must be a multiple of kv_heads \(3\)"),
        ("tiny://qwen2?dtype=int8", r"dtype must be one of float32, bfloat16"),
        ("tiny://qwen2?tied=2", r"tied must be 0 or 1"),
        ("bundled://gpt5", r"no such bundled model; known: smollm2-135m-instruct"),
        ("hf://just-a-name", r"write it as hf://organisation/name"),
        ("hf://organisation/bad name", r"not a valid hub name"),
        ("no/such/folder", r"no/such/folder: no such folder"),
        ("organisation/name", r"for a model of the Hugging Face hub write hf://organisation/name"),
    ],
)
def test_a_wrong_uri_says_what_is_right(uri, message, tmp_path):
    with pytest.raises(UserError, match=message):
        resolve_model(uri, tmp_path)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", r"config\.json is missing"),
        ("model.safetensors", r"model\.safetensors is missing"),
        ("tokenizer.json", r"tokenizer is missing"),
    ],
)
def test_a_folder_that_is_no_model_names_the_missing_file(removed, message, copied, tmp_path):
    (copied / removed).unlink()
    with pytest.raises(UserError, match=message):
        resolve_model(str(copied), tmp_path)


def test_pickles_damaged_indexes_and_missing_shards_are_refused(copied, tmp_path):
    (copied / "model.safetensors").rename(copied / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle, which is never loaded"):
        resolve_model(str(copied), tmp_path)
    (copied / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(UserError, match=r"names model-00001-of-00002\.safetensors, which is missing"):
        resolve_model(str(copied), tmp_path)
    (copied / INDEX).write_text("{")
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        resolve_model(str(copied), tmp_path)
    with pytest.raises(UserError, match=r"a file; name the model's folder"):
        resolve_model(str(copied / "config.json"), tmp_path)


def test_the_hub_offline(monkeypatch, tmp_path):
    """Without the network: a model in the hub's cache is found, another one is an error that says why."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    snapshot = tmp_path / "hub" / "models--o--cached" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--o--cached" / "refs").mkdir()
    (tmp_path / "hub" / "models--o--cached" / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (snapshot / name).write_text("{}")
    code = """
from tuneloop.errors import UserError
from tuneloop.models.sources import resolve_model
print(resolve_model("hf://o/cached@main"))
try:
    resolve_model("hf://o/absent")
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        str(snapshot),
        "hf://o/absent: not in the hub's cache and HF_HUB_OFFLINE is set: unset it once, or name a local folder",
    ], done.stderr


def test_the_hub_out_of_reach_is_a_reason_to_try_again(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(TryAgain, match="hf://o/absent"):
        resolve_model("hf://o/absent", tmp_path)


def test_s3_is_fetched_once_and_again_when_it_was_replaced(s3_server: S3Server, copied, tmp_path):  # noqa: F811
    uri = f"s3://{BUCKET}/models/one"
    storage = open_storage(uri)
    storage.put_tree(copied, "")
    first = resolve_model(uri, tmp_path / "cache")
    assert (first / "model.safetensors").read_bytes() == (copied / "model.safetensors").read_bytes()
    s3_server.reset()
    assert resolve_model(uri + "/", tmp_path / "cache") == first
    assert {method for method, _ in s3_server.requests} == {"GET"}
    assert len(s3_server.requests) == 1  # the listing
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    storage.write_bytes("model.safetensors", bytes(weights))
    second = resolve_model(uri, tmp_path / "cache")
    assert second != first
    assert (second / "model.safetensors").read_bytes() == weights
    with pytest.raises(UserError, match="holds no files"):
        resolve_model(f"s3://{BUCKET}/models/two", tmp_path / "cache")


def test_a_model_that_changes_while_it_is_fetched_is_not_kept(
    s3_server: S3Server,  # noqa: F811
    copied,
    tmp_path,
    monkeypatch,
):
    storage = open_storage(f"s3://{BUCKET}/models/one")
    storage.put_tree(copied, "")
    fetch = type(storage).get_tree

    def replaced_meanwhile(self, *arguments, **options):
        result = fetch(self, *arguments, **options)
        storage.write_bytes("config.json", b"{ }")
        return result

    monkeypatch.setattr(type(storage), "get_tree", replaced_meanwhile)
    with pytest.raises(TryAgain, match="was changed while it was fetched"):
        resolve_model(storage.uri, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache" / "s3").iterdir() if path.is_dir()] == []


def test_the_cache_is_filled_by_one_and_waited_for_by_the_others(tmp_path):
    fillings, entered, proceed = [], threading.Event(), threading.Event()

    def fill(folder: Path) -> None:
        fillings.append(folder)
        entered.set()
        assert proceed.wait(10)
        (folder / "file").write_text("whole")

    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append((cached_folder(tmp_path / "a", fill) / "file").read_text()))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert entered.wait(10)
    assert not (tmp_path / "a").exists()
    proceed.set()
    for thread in threads:
        thread.join()
    assert found == ["whole"] * 3
    assert len(fillings) == 1


def test_a_filling_that_fails_leaves_nothing_and_a_killed_ones_rest_is_cleared(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(tmp_path / "a", fail)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "rest").write_text("")
    assert list(cached_folder(tmp_path / "a", lambda folder: None).iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_clear_line(tmp_path):
    def no_room(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device.*set TUNELOOP_CACHE"):
        cached_folder(tmp_path / "a", no_room)


def test_importing_and_refusing_needs_no_torch():
    code = (
        "import sys; from tuneloop.models.sources import resolve_model\n"
        "try: resolve_model('tiny://qwen2?layers=0')\n"
        "except Exception as error: print(error)\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'boto3'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["tiny://qwen2?layers=0: layers must be between 1 and 64", "[]"], done.stderr
