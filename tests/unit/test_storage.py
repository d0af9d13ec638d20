"""The storage contract, on a folder and on S3 over real HTTP."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.s3_server import BUCKET, S3Server, s3_server  # noqa: F401
from tuneloop.errors import UserError
from tuneloop.storage import (
    ABSENT,
    Damaged,
    LocalStorage,
    NotFound,
    Storage,
    VersionConflict,
    download_tree,
    local_copy,
    local_path,
    open_storage,
    read_stream,
    storage_for,
)


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "store"))
    request.getfixturevalue("s3_server")
    return open_storage(f"s3://{BUCKET}/some/prefix")


def test_what_is_put_is_read_back(storage):
    assert not storage.exists("a/b.bin")
    storage.write_bytes("a/b.bin", b"one")
    storage.write_bytes("a/b.bin", b"two")
    storage.write_bytes("empty", b"")
    assert storage.read_bytes("a/b.bin") == b"two"
    assert storage.read_bytes("empty") == b""
    assert storage.exists("a/b.bin")
    assert not storage.exists("a")
    storage.delete("a/b.bin")
    storage.delete("a/b.bin")
    storage.delete("never/was")
    assert not storage.exists("a/b.bin")
    with pytest.raises(NotFound, match=r"a/b\.bin: no such"):
        storage.read_bytes("a/b.bin")
    with pytest.raises(NotFound):
        storage.open_read("a/b.bin")


def test_listing_is_by_folder_and_holds_only_what_was_put(storage):
    assert not storage.exists("v")
    for key in ("v/10/x", "v/1/y/z", "v/1/x", "value", "top"):
        storage.write_bytes(key, b"x")
    assert storage.list("v") == ["v/1/x", "v/1/y/z", "v/10/x"]
    assert storage.list("v/1") == ["v/1/x", "v/1/y/z"]
    assert storage.list() == ["top", "v/1/x", "v/1/y/z", "v/10/x", "value"]
    assert storage.list("nothing") == []


def test_a_key_that_could_leave_the_root_or_hit_a_sidecar_is_refused(storage):
    for key in ("", "/a", "a//b", "../a", "a/./b", "a/", "a\\b"):
        with pytest.raises(UserError, match="not a key"):
            storage.write_bytes(key, b"x")
    for key in (".lock", "a/.b.sha256", ".tmp-1", ".tmp-1/b"):
        with pytest.raises(UserError, match="reserved"):
            storage.write_bytes(key, b"x")


def test_conditional_writes(storage):
    first = storage.write_bytes("alias", b"1", if_version=ABSENT)
    with pytest.raises(VersionConflict):
        storage.write_bytes("alias", b"2", if_version=ABSENT)
    assert storage.read_versioned("alias") == (b"1", first)
    second = storage.write_bytes("alias", b"2", if_version=first)
    with pytest.raises(VersionConflict):
        storage.write_bytes("alias", b"3", if_version=first)
    assert storage.read_versioned("alias") == (b"2", second)
    with pytest.raises(VersionConflict):
        storage.write_bytes("missing", b"3", if_version=second)
    assert not storage.exists("missing")


def test_of_eight_racing_writers_exactly_one_wins_every_round(storage):
    tag, barrier = None, threading.Barrier(8)

    def race(writer: int) -> tuple[int, str] | None:
        barrier.wait()
        try:
            return writer, storage.write_bytes("alias", f"{turn} {writer}".encode(), if_version=tag or ABSENT)
        except VersionConflict:
            return None

    with ThreadPoolExecutor(8) as pool:
        for turn in range(15):
            winners = [result for result in pool.map(race, range(8)) if result]
            assert len(winners) == 1
            writer, tag = winners[0]
            assert storage.read_versioned("alias") == (f"{turn} {writer}".encode(), tag)


def test_readers_never_meet_a_half_written_value(storage):
    values = [bytes([letter]) * 300_000 for letter in b"abcd"]
    storage.write_bytes("alias", values[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for value in values:
                storage.write_bytes("alias", value)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            assert storage.read_bytes("alias") in values
    finally:
        stop.set()
        thread.join()


def test_streams_are_read_to_the_end_in_pieces(storage):
    data = os.urandom(2_500_001)
    storage.write_bytes("big", data)
    with storage.open_read("big") as stream:
        assert stream.read(10) == data[:10]
        assert b"".join(iter(lambda: stream.read(700_000), b"")) == data[10:]
    storage.write_bytes("lines", b"one\ntwo\n")
    with io.TextIOWrapper(storage.open_read("lines"), encoding="utf-8") as text:
        assert list(text) == ["one\n", "two\n"]


def test_trees_go_out_and_come_back(storage, tmp_path):
    source = tmp_path / "adapter"
    (source / "deep").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    (source / "deep" / "weights.bin").write_bytes(os.urandom(9_000_000))  # beyond one part of a multipart upload
    (source / ".gitattributes").write_text("kept")
    sent = storage.put_tree(source, "versions/1/adapter")
    counted: list[int] = []
    fetched = storage.get_tree("versions/1/adapter", tmp_path / "back", on_file=counted.append)
    assert sent == fetched
    assert sorted(sent) == [".gitattributes", "config.json", "deep/weights.bin"]
    assert counted == [3, 3, 3]
    for name in sent:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    with pytest.raises(UserError, match="in the way"):
        storage.get_tree("versions/1/adapter", tmp_path / "back")
    with pytest.raises(NotFound, match="holds no files"):
        storage.get_tree("versions/2", tmp_path / "none")
    with pytest.raises(UserError, match="no such folder"):
        storage.put_tree(tmp_path / "gone", "x")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp")) == []


def test_damage_is_noticed_by_every_get_and_leaves_no_file(storage, tmp_path, request):
    storage.write_bytes("v/weights", b"right" * 1000)
    storage.write_bytes("v/zz", b"intact")
    wrong = b"wrong" * 1000
    if isinstance(storage, LocalStorage):
        (storage.root / "v/weights").write_bytes(wrong)
    else:
        server: S3Server = request.getfixturevalue("s3_server")
        kept = server.client().head_object(Bucket=BUCKET, Key="some/prefix/v/weights")["Metadata"]
        server.client().put_object(Bucket=BUCKET, Key="some/prefix/v/weights", Body=wrong, Metadata=kept)
    with pytest.raises(Damaged, match="weights"):
        storage.read_bytes("v/weights")
    with storage.open_read("v/weights") as stream, pytest.raises(Damaged):
        stream.read()
    with pytest.raises(Damaged):
        storage.get_file("v/weights", tmp_path / "weights")
    with pytest.raises(Damaged):
        storage.get_tree("v", tmp_path / "tree")
    assert [path.name for path in tmp_path.iterdir() if path.name != "store"] == []


# Local folders


def test_a_root_or_a_folder_that_is_a_file_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        open_storage(str(tmp_path / "file"))
    storage = open_storage(str(tmp_path))
    with pytest.raises(UserError, match="in the way"):
        storage.write_bytes("file/below", b"x")
    storage.write_bytes("folder/x", b"x")
    with pytest.raises(UserError, match="in the way"):
        storage.write_bytes("folder", b"x")
    with pytest.raises(UserError, match="in the way"):
        storage.read_bytes("folder")


def test_sidecars_are_what_sha256sum_checks(tmp_path):
    storage = open_storage(str(tmp_path))
    storage.write_bytes("name", b"old")
    storage.write_bytes("name", b"new")
    check = subprocess.run(["sha256sum", "-c", ".name.sha256"], cwd=tmp_path, capture_output=True, text=True)
    assert check.stdout == "name: OK\n"


def test_files_of_other_origin_are_read_and_replaced(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    storage = open_storage(str(tmp_path))
    assert storage.read_bytes("rows.jsonl") == b"{}\n"
    tag = storage.read_versioned("rows.jsonl")[1]
    storage.write_bytes("rows.jsonl", b"[]\n", if_version=tag)
    assert storage.read_bytes("rows.jsonl") == b"[]\n"


def test_a_file_replaced_between_its_open_and_its_sidecar_is_opened_again(tmp_path, monkeypatch):
    from tuneloop.storage import local

    storage, vouched = open_storage(str(tmp_path)), local._vouched
    storage.write_bytes("alias", b"old")

    def replaced_first(path: Path) -> frozenset[str]:
        monkeypatch.setattr(local, "_vouched", vouched)
        storage.write_bytes("alias", b"new")
        return vouched(path)

    monkeypatch.setattr(local, "_vouched", replaced_first)
    assert storage.read_bytes("alias") == b"new"


KEEPS_WRITING = """
import sys
from tuneloop.storage import open_storage
storage = open_storage(sys.argv[1])
count = 0
while True:
    count += 1
    storage.write_bytes("alias", str(count).encode() * 1000)
    print(count, flush=True)
"""


def test_a_writer_killed_at_any_instant_leaves_a_whole_value_and_no_lock(tmp_path):
    storage = open_storage(str(tmp_path))
    for _ in range(10):
        child = subprocess.Popen([sys.executable, "-c", KEEPS_WRITING, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        *_, last = map(int, (first + child.stdout.read()).split())
        child.wait()
        value = storage.read_bytes("alias").decode()
        assert value in (str(last) * 1000, str(last + 1) * 1000)
        storage.write_bytes("alias", b"0")
    assert storage.list() == ["alias"]


def test_a_full_disk_propagates_and_leaves_the_old_value(tmp_path):
    storage = open_storage(str(tmp_path))
    storage.write_bytes("alias", b"old")

    class Full(io.BytesIO):
        def read(self, *size):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        storage._put("alias", Full(), None)  # pyright: ignore
    assert storage.read_bytes("alias") == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".alias.sha256", ".lock", "alias"]


# URIs


def test_local_uris(tmp_path):
    (tmp_path / "two words.txt").write_text("content")
    for uri in (str(tmp_path / "two words.txt"), f"file://{tmp_path}/two%20words.txt"):
        assert local_path(uri) == tmp_path / "two words.txt"
        with read_stream(uri) as stream:
            assert stream.read() == b"content"
        with local_copy(uri) as path:
            assert path == tmp_path / "two words.txt"
    with pytest.raises(UserError, match="only local"):
        local_path("s3://bucket/key")
    with pytest.raises(UserError, match="only local"):
        open_storage("gs://bucket")
    with pytest.raises(NotFound, match="nothing: no such file"), local_copy(str(tmp_path / "nothing")):
        pass


@pytest.mark.parametrize("uri", ["s3://", "s3://bucket", "s3://bucket/", "s3://bucket/folder/"])
def test_an_s3_uri_that_names_no_object(uri):
    with pytest.raises(UserError, match="names no"):
        storage_for(uri)


def test_streams_copies_and_trees_by_s3_uri(s3_server, tmp_path, capsys):  # noqa: F811
    client = s3_server.client()
    for name in ("config.json", "weights/1.bin"):
        client.put_object(Bucket=BUCKET, Key=f"base/{name}", Body=name.encode())
    client.put_object(Bucket=BUCKET, Key="base/weights/", Body=b"")  # a console's folder mark
    with read_stream(f"s3://{BUCKET}/base/config.json") as stream:
        assert stream.read() == b"config.json"
    with local_copy(f"s3://{BUCKET}/base/config.json") as path:
        assert path.read_bytes() == b"config.json"
    assert not path.exists()
    to = download_tree(f"s3://{BUCKET}/base", tmp_path / "model")
    assert (to / "weights/1.bin").read_bytes() == b"weights/1.bin"
    assert "2/2" in capsys.readouterr().out
    s3_server.requests.clear()
    download_tree(f"s3://{BUCKET}/base", tmp_path / "model")
    assert s3_server.requests == []
    with pytest.raises(NotFound, match=r"nothing.*holds no files"):
        download_tree(f"s3://{BUCKET}/nothing", tmp_path / "other")
    assert not (tmp_path / "other").exists()
