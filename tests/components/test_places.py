"""Steps whose inputs and outputs lie in an object store: a real S3 server over HTTP, steps of a few lines."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from components.exit_codes import exit_code_of
from components.mirror import MARKER, Mirror, restore, saved_update
from components.node import run_in_pipeline
from components.result import StepResult
from components.runner import Step, execute
from components.step_command import main
from tests.s3_server import s3_server  # noqa: F401 - a fixture
from tests.tiny_run import tiny_config, tiny_toml
from tuneloop.checkpoint import CheckpointStore
from tuneloop.errors import TryAgain, UserError
from tuneloop.storage import open_storage, read_file

RUN = "s3://models/runs/first"


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch, s3_server):  # noqa: F811
    """A machine with an empty disk."""
    monkeypatch.setenv("TUNELOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    return tmp_path / "cache"


@pytest.fixture
def config():
    return tiny_config()


def write_answer(config, inputs, output):
    """Writes 42."""
    (output / "deep").mkdir()
    (output / "deep" / "answer").write_text("42")
    return {"answer": 42, "passed": True}


def copy_answer(config, inputs, output):
    """Copies the answer."""
    (output / "answer").write_text((inputs["data"] / "deep" / "answer").read_text())
    return {}


PRODUCER = Step("check", (), write_answer, sections=("lora",))
CONSUMER = Step("data_prep", ("data",), copy_answer, sections=("data_prep",))


def keys(uri: str = RUN) -> list[str]:
    return open_storage(uri).list()


def test_output_is_stored_and_read_by_the_next_step(config, machine, s3_server):  # noqa: F811
    result = execute(PRODUCER, config, {}, f"{RUN}/check")
    assert keys() == ["check/config.json", "check/deep/answer", "check/step.json"]
    assert StepResult.parse(read_file(f"{RUN}/check/step.json"), "") == result
    assert [path for method, path in s3_server.requests if method == "PUT"][-1].endswith("check/step.json")
    shutil.rmtree(machine)  # the next step runs elsewhere
    after = execute(CONSUMER, config, {"data": f"{RUN}/check"}, f"{RUN}/data_prep")
    assert read_file(f"{RUN}/data_prep/answer") == b"42"
    assert after.inputs == {"data": f"{RUN}/check"}


def test_fingerprints_are_those_of_local_folders(config, tmp_path):
    here = execute(PRODUCER, config, {}, str(tmp_path / "check"))
    there = execute(PRODUCER, config, {}, f"{RUN}/check")
    assert here.fingerprint == there.fingerprint
    local = execute(CONSUMER, config, {"data": str(tmp_path / "check")}, str(tmp_path / "data_prep"))
    assert execute(CONSUMER, config, {"data": f"{RUN}/check"}, f"{RUN}/data_prep").fingerprint == local.fingerprint


def test_finished_output_is_reused_and_never_replaced(config, machine, capsys):
    first = execute(PRODUCER, config, {}, f"{RUN}/check")
    shutil.rmtree(machine)
    assert execute(PRODUCER, config, {}, f"{RUN}/check") == first
    assert "already done" in capsys.readouterr().out
    with pytest.raises(UserError, match="made from other settings"):
        execute(PRODUCER, tiny_config("lora.rank=2"), {}, f"{RUN}/check")


def test_missing_input_is_one_clear_line(config):
    with pytest.raises(UserError, match=r"--data s3://models/runs/first/nothing: does not exist"):
        execute(CONSUMER, config, {"data": f"{RUN}/nothing"}, f"{RUN}/data_prep")
    assert keys() == []


def test_step_that_fails_stores_nothing(config):
    def fail(config, inputs, output):
        """Fails."""
        (output / "half").write_text("x")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        execute(Step("check", (), fail, sections=()), config, {}, f"{RUN}/check")
    assert keys() == []


def test_what_a_killed_attempt_stored_is_no_part_of_the_output(config):
    open_storage(RUN).write_bytes("check/stale", b"of an attempt that was killed")
    execute(PRODUCER, config, {}, f"{RUN}/check")
    assert "check/stale" not in keys()


def test_work_that_could_not_be_stored_is_not_done_again(config, s3_server):  # noqa: F811
    calls = []

    def count(config, inputs, output):
        """Counts."""
        calls.append(1)
        return {}

    step = Step("check", (), count, sections=())
    s3_server.refuse = {("PUT", 503, "SlowDown"): 1000}
    with pytest.raises(TryAgain, match="unavailable"):
        execute(step, config, {}, f"{RUN}/check")
    s3_server.refuse = {}
    execute(step, config, {}, f"{RUN}/check")
    assert len(calls) == 1
    assert "check/step.json" in keys()


def test_of_two_machines_one_stores_the_output(config, machine, monkeypatch):
    def slower(config, inputs, output):
        """Ends after somebody else."""
        monkeypatch.setenv("TUNELOOP_CACHE", str(machine / "other"))
        execute(PRODUCER, config, {}, f"{RUN}/check")
        return write_answer(config, inputs, output)

    monkeypatch.setenv("TUNELOOP_CACHE", str(machine / "one"))
    result = execute(Step("check", (), slower, sections=("lora",)), config, {}, f"{RUN}/check")
    assert StepResult.parse(read_file(f"{RUN}/check/step.json"), "") == result


def test_the_files_of_the_first_are_not_replaced_by_the_second(config, machine, monkeypatch):
    def slower(config, inputs, output):
        """Ends after somebody else, with another answer."""
        monkeypatch.setenv("TUNELOOP_CACHE", str(machine / "other"))
        execute(PRODUCER, config, {}, f"{RUN}/check")
        (output / "deep").mkdir()
        (output / "deep" / "answer").write_text("43")
        return {"answer": 43}

    monkeypatch.setenv("TUNELOOP_CACHE", str(machine / "one"))
    result = execute(Step("check", (), slower, sections=("lora",)), config, {}, f"{RUN}/check")
    assert result.summary["answer"] == 42
    assert read_file(f"{RUN}/check/deep/answer") == b"42"


class Training:
    """A resumable step that counts to 4 and saves each number; it stops after `stop_after`."""

    def __init__(self, stop_after: int | None = None):
        self.stop_after, self.began_at = stop_after, -1
        self.step = Step("lora_rl", (), self.run, sections=("lora",), resumable=True)

    def run(self, config, inputs, output: Path):
        """Counts."""
        store = CheckpointStore(output / "checkpoints", keep=2)
        latest = store.latest()
        self.began_at = int((latest.path / "count").read_text()) if latest else 0
        for count in range(self.began_at + 1, 5):
            with (output / "metrics.jsonl").open("a") as log:
                log.write(f"{count}\n")
            store.save(count, lambda folder, count=count: (folder / "count").write_text(str(count)))
            if count == self.stop_after:
                raise TryAgain("stopped")
        return {"counted": 4}


def test_training_goes_on_where_another_machine_was_stopped(config, machine, capsys):
    with pytest.raises(TryAgain):
        execute(Training(stop_after=2).step, config, {}, f"{RUN}/lora_rl")
    found = keys()
    assert f"lora_rl.partial/checkpoints/update-000002/{MARKER}" in found
    assert "lora_rl/step.json" not in found
    shutil.rmtree(machine)
    again = Training()
    execute(again.step, config, {}, f"{RUN}/lora_rl")
    assert again.began_at == 2
    assert read_file(f"{RUN}/lora_rl/metrics.jsonl") == b"1\n2\n3\n4\n"
    assert "fetched update-000002" in capsys.readouterr().out
    assert not [key for key in keys() if ".partial" in key or "checkpoints" in key]


def test_newer_state_on_this_machine_is_kept(config, machine, s3_server):  # noqa: F811
    with pytest.raises(TryAgain):
        execute(Training(stop_after=1).step, config, {}, f"{RUN}/lora_rl")
    s3_server.refuse = {("PUT", 503, "SlowDown"): 1000}
    with pytest.raises(TryAgain):
        execute(Training(stop_after=3).step, config, {}, f"{RUN}/lora_rl")
    s3_server.refuse = {}
    again = Training()
    execute(again.step, config, {}, f"{RUN}/lora_rl")
    assert again.began_at == 3


def test_state_of_other_settings_is_dropped(config, machine, capsys):
    with pytest.raises(TryAgain):
        execute(Training(stop_after=2).step, config, {}, f"{RUN}/lora_rl")
    shutil.rmtree(machine)
    again = Training()
    execute(again.step, tiny_config("lora.rank=2"), {}, f"{RUN}/lora_rl")
    assert again.began_at == 0
    assert "starting over" in capsys.readouterr().out


def save(partial: Path, update: int, text: str) -> None:
    def write(folder: Path) -> None:
        (folder / "x").write_text(text)

    CheckpointStore(partial / "checkpoints", keep=1).save(update, write)


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)


def test_checkpoints_go_up_while_the_step_runs_and_older_ones_leave(tmp_path):
    partial = tmp_path / "out.partial"
    storage = open_storage(f"{RUN}/out.partial")
    with Mirror(partial, storage):
        save(partial, 1, "one")
        wait_for(lambda: f"checkpoints/update-000001/{MARKER}" in storage.list())
        save(partial, 2, "two")
        wait_for(lambda: storage.list() == [f"checkpoints/update-000002/{MARKER}", "checkpoints/update-000002/x"])
    assert not partial.with_name("out.partial.sending").exists()


def test_a_fetched_checkpoint_stays_whole_in_the_store(tmp_path, s3_server):  # noqa: F811
    storage, first = open_storage(f"{RUN}/out.partial"), tmp_path / "out.partial"
    save(first, 1, "one")
    Mirror(first, storage).send()
    other = tmp_path / "other.partial"
    restore(storage, other)
    s3_server.requests.clear()
    Mirror(other, storage).send()  # a kill at any instant of this must find a checkpoint in the store
    assert {method for method, _ in s3_server.requests} == {"GET"}
    save(other, 2, "two")
    Mirror(other, storage).send()
    assert saved_update(storage) == "update-000002"


def test_a_pod_that_is_behind_leaves_the_newer_checkpoint_of_another(tmp_path):
    storage = open_storage(f"{RUN}/out.partial")
    ahead, behind = tmp_path / "ahead.partial", tmp_path / "behind.partial"
    save(ahead, 7, "seven")
    save(behind, 3, "three")
    Mirror(ahead, storage).send()
    Mirror(behind, storage).send()
    assert saved_update(storage) == "update-000007"
    assert "checkpoints/update-000007/x" in storage.list()


def test_checkpoint_that_leaves_while_it_is_fetched_is_tried_again(tmp_path, monkeypatch):
    partial, storage = tmp_path / "out.partial", open_storage(f"{RUN}/out.partial")
    save(partial, 1, "one")
    Mirror(partial, storage).send()
    listed = storage.list()
    storage.delete("checkpoints/update-000001/x")
    monkeypatch.setattr(storage, "list", lambda *_: listed)
    with pytest.raises(TryAgain, match="while it was fetched"):
        restore(storage, tmp_path / "other.partial")
    assert not (tmp_path / "other.partial").exists()


def test_what_is_wrong_with_one_sending_does_not_end_the_sending(tmp_path, monkeypatch, capsys):
    partial, storage = tmp_path / "out.partial", open_storage(f"{RUN}/out.partial")
    send, calls = Mirror.send, []

    def fails_once(mirror: Mirror) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("can't start new thread")
        send(mirror)

    monkeypatch.setattr(Mirror, "send", fails_once)
    with Mirror(partial, storage):
        save(partial, 1, "one")
        wait_for(lambda: saved_update(storage) == "update-000001")
    assert "can't start new thread" in capsys.readouterr().err


def test_step_is_not_held_up_by_a_store_that_is_away(tmp_path, s3_server, capsys):  # noqa: F811
    partial = tmp_path / "out.partial"
    storage = open_storage(f"{RUN}/out.partial")
    s3_server.refuse = {(method, 503, "SlowDown"): 1000 for method in ("PUT", "DELETE")}
    with Mirror(partial, storage):
        started = time.monotonic()
        save(partial, 1, "one")
        assert time.monotonic() - started < 1.0
        wait_for(lambda: "on this machine only" in capsys.readouterr().err)
        s3_server.refuse = {}
        wait_for(lambda: f"checkpoints/update-000001/{MARKER}" in storage.list())


def test_every_instant_of_a_mirror_leaves_a_whole_checkpoint(tmp_path):
    """Whatever is listed while checkpoints follow one another quickly, a committed one is complete."""
    partial, storage = tmp_path / "out.partial", open_storage(f"{RUN}/out.partial")
    save(partial, 1, "1")
    ended = threading.Event()

    def train() -> None:
        for update in range(2, 40):
            save(partial, update, str(update))
        ended.set()

    with Mirror(partial, storage) as _:
        trainer = threading.Thread(target=train)
        trainer.start()
        while not ended.is_set():
            listed = storage.list()
            for key in listed:
                if key.endswith(MARKER):
                    assert key.replace(MARKER, "x") in listed
        trainer.join()
        wait_for(lambda: f"checkpoints/update-000039/{MARKER}" in storage.list())


def test_command_line_of_a_node(tmp_path, capsys, s3_server):  # noqa: F811
    """As the Argo rendering runs it: JSON as the config, parameters, outputs as files, a record of a failure."""
    text = json.dumps(tiny_config().model_dump(mode="json"))
    step = Step("check", (), lambda config, inputs, output: {"rank": config.lora.rank, "passed": True}, sections=())
    options = ["--config", text, "--output", f"{RUN}/check", "--node"]
    assert main(step, [*options, "--parameter", "lora_rank=2", "--outputs", str(tmp_path / "outputs")]) == 0
    assert {path.name: path.read_text() for path in (tmp_path / "outputs").iterdir()} == {"rank": "2", "passed": "true"}
    assert json.loads(read_file(f"{RUN}/config.json"))["lora"]["rank"] == 2
    later = ["--config", f"{RUN}/config.json", "--node", "--data", f"{RUN}/check", "--output"]
    assert main(CONSUMER, [*later, f"{RUN}/data_prep"]) == 1  # its input holds no answer
    assert json.loads(read_file(f"{RUN}/data_prep.failed.json"))["exit_code"] == 1
    assert "deep/answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parameter", "rank=2"], "write it as NAME=VALUE, with a name of base_model"),
        (["--parameter", "updates=many"], "expected a whole number"),
        (["--output", "/check", "--node"], "output_uri: is empty"),
        (["--output", "run/other", "--node"], "with --node it is <run>/check"),
        (["--config", "s3://models/none.json"], "no such object"),
        (["--config", "{"], "config: not valid JSON"),
    ],
)
def test_mistakes_of_a_command_line(options, message, tmp_path, capsys):
    given = ["--config", str(tiny_toml(tmp_path)), "--output", str(tmp_path / "run" / "check"), *options]
    assert main(PRODUCER, given) == 2
    assert message in capsys.readouterr().err


def test_empty_output_uri_is_refused_before_anything_is_written(capsys):
    with pytest.raises(SystemExit) as ended:
        run_in_pipeline("check", config="{}", output_uri="")
    assert ended.value.code == 2
    assert "output_uri: is empty" in capsys.readouterr().err


def test_store_without_a_bucket_is_the_users_mistake(config, capsys):
    assert exit_code_of(lambda: execute(PRODUCER, config, {}, "s3://nowhere/run/check")) == 2
    assert "the bucket does not exist" in capsys.readouterr().err
