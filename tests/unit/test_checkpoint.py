"""A checkpoint is there whole or not at all, whatever happens to the process or to the disk."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneloop.checkpoint import MARKER, CheckpointStore

SAVES_FOREVER = """
import sys
from pathlib import Path
from tuneloop.checkpoint import CheckpointStore

def write(folder):
    for name in ("adapter.bin", "state/optimizer.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(update.to_bytes(8, "big") * 4096)

store = CheckpointStore(Path(sys.argv[1]), keep=2)
latest = store.latest()
update = latest.update if latest else 0
while True:
    update += 1
    store.save(update, write)
    print(update, flush=True)
"""


def writer(text: str):
    def write(folder: Path) -> None:
        (folder / "adapter.txt").write_text(text)
        (folder / "state").mkdir()
        (folder / "state" / "optimizer.txt").write_text(text * 2)

    return write


def test_the_newest_checkpoint_is_found_and_older_ones_beyond_keep_are_removed(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    for update in (10, 20, 30):
        saved = store.save(update, writer(f"weights {update}"))
        assert store.latest() == saved
    assert sorted(path.name for path in store.folder.iterdir()) == ["update-000020", "update-000030"]
    assert (store.folder / "update-000030/state/optimizer.txt").read_text() == "weights 30weights 30"


def test_updates_are_ordered_as_numbers_beyond_six_digits(tmp_path):
    store = CheckpointStore(tmp_path, keep=5)
    for update in (999_999, 1_000_000):
        store.save(update, writer(str(update)))
    latest = store.latest()
    assert latest is not None
    assert latest.update == 1_000_000


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "marker", "marker_gone", "renumber"])
def test_a_damaged_checkpoint_is_reported_in_one_line_and_the_one_before_is_used(tmp_path, capsys, damage):
    store = CheckpointStore(tmp_path, keep=2)
    before = store.save(1, writer("first"))
    newest = store.save(2, writer("second"))
    victim = newest.path / "state" / "optimizer.txt"
    if damage == "flip":
        victim.write_text("secondsecone")  # as long as what was written
    elif damage == "truncate":
        victim.write_text("sec")
    elif damage == "remove":
        victim.unlink()
    elif damage == "marker":
        (newest.path / MARKER).write_text('{"update": 2')
    elif damage == "marker_gone":
        (newest.path / MARKER).unlink()
    else:
        os.rename(newest.path, tmp_path / "update-000007")
    assert store.latest() == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "update-00000" in lines[0]
    assert "damaged" in lines[0]


def test_all_damaged_means_none(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    (store.save(1, writer("only")).path / "adapter.txt").unlink()
    assert store.latest() is None


def test_saving_after_a_damaged_newest_one_survives_pruning(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    damaged = store.save(9, writer("nine"))
    (damaged.path / "adapter.txt").unlink()
    saved = store.save(5, writer("five"))
    assert store.latest() == saved
    assert not damaged.path.exists()


def test_the_same_update_is_replaced(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(4, writer("old"))
    saved = store.save(4, writer("new"))
    assert store.latest() == saved
    assert (saved.path / "adapter.txt").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["update-000004"]


def test_killed_while_replacing_finds_the_replaced_one(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    saved = store.save(4, writer("old"))
    os.rename(saved.path, tmp_path / "update-000004.replaced")  # the instant between the two renames
    latest = store.latest()
    assert latest is not None
    assert (latest.update, (latest.path / "adapter.txt").read_text()) == (4, "old")


def test_a_full_disk_propagates_and_the_previous_checkpoint_stays(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    before = store.save(1, writer("first"))

    def fills_the_disk(folder: Path) -> None:
        (folder / "adapter.txt").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        store.save(2, fills_the_disk)
    assert store.latest() == before
    assert [path.name for path in tmp_path.iterdir()] == ["update-000001"]


def test_stale_temporary_folders_are_removed_by_the_next_save(tmp_path):
    stale = tmp_path / "update-000003.tmp-dead"
    stale.mkdir()
    (stale / "adapter.txt").write_text("half")
    CheckpointStore(tmp_path, keep=1).save(4, writer("four"))
    assert [path.name for path in tmp_path.iterdir()] == ["update-000004"]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        CheckpointStore(tmp_path, keep=0)


@settings(max_examples=40, deadline=None)
@given(files=st.dictionaries(st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8}\.bin)", fullmatch=True), st.binary(max_size=300),
                             max_size=4), keep=st.integers(1, 3), count=st.integers(1, 5))  # fmt: skip
def test_whatever_is_written_is_read_back(tmp_path_factory, files, keep, count):
    store = CheckpointStore(tmp_path_factory.mktemp("store"), keep=keep)

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)

    for update in range(count):
        store.save(update, write)
    latest = store.latest()
    assert latest is not None
    assert latest.update == count - 1
    assert {name: (latest.path / name).read_bytes() for name in files} == files
    assert len(list(store.folder.iterdir())) == min(keep, count)
    assert set(json.loads((latest.path / MARKER).read_text())["files"]) == set(files)


def test_killed_at_any_instant_the_old_or_the_new_one_is_there(tmp_path, capsys):
    store, chance = CheckpointStore(tmp_path, keep=2), random.Random(5)
    seen = 0
    for _ in range(15):
        child = subprocess.Popen(
            [sys.executable, "-c", SAVES_FOREVER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        first = child.stdout.readline()  # it runs: from here on, any instant
        time.sleep(chance.uniform(0.0, 0.05))
        child.send_signal(signal.SIGKILL)
        reported = [int(line) for line in [first, *child.stdout.read().splitlines()] if line.strip()]
        child.wait()
        latest = store.latest()
        assert latest is not None
        assert latest.update >= max(reported), "a save that returned was lost"
        assert latest.update >= seen
        assert (latest.path / "adapter.bin").read_bytes() == latest.update.to_bytes(8, "big") * 4096
        seen = latest.update
    assert capsys.readouterr().err == "", "a kill left a checkpoint that looks committed and is damaged"
    assert seen > 15
