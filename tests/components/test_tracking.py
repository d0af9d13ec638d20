"""Metrics in real trackers: MLflow in a folder, Weights & Biases offline, and trackers that are off, down or late."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from components.config import RunConfig
from components.runner import execute
from components.sft_warmup.step import STEP as SFT_WARMUP
from tests.prepared_data import write_prepared
from tests.tiny_run import tiny_config
from tuneloop.errors import TryAgain, UserError
from tuneloop.tracking import delivery, tracked
from tuneloop.tracking.delivery import Delivery
from tuneloop.tracking.follow import Follower
from tuneloop.tracking.settings import MlflowSettings, TrackingSettings, WandbSettings
from tuneloop.tracking.tracker import Outcome, TrackedRun
from tuneloop.tracking.tracking import flatten

REPOSITORY = Path(__file__).resolve().parents[2]
Points = dict[str, list[tuple[int, float]]]


@pytest.fixture(autouse=True)
def nothing_from_outside(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(delivery, "POLL_SECONDS", 0.05)


def append(log: Path, *updates: int) -> None:
    with log.open("a") as file:
        for update in updates:
            file.write(json.dumps({"update": update, "time": update / 2, "reward/mean": update / 10}) + "\n")


def in_mlflow(uri: str) -> tuple[list[str], Points, dict[str, str]]:
    """Statuses of all runs; every point of the first one; its parameters."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tuneloop")
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    first = runs[0].info.run_id
    points = {
        name: [(point.step, point.value) for point in client.get_metric_history(first, name)]
        for name in runs[0].data.metrics
    }
    return [run.info.status for run in runs], points, runs[0].data.params


def in_wandb(folder: Path) -> tuple[set[str], Points]:
    """Ids of all offline runs under `folder`, which have ended, and every point in them."""
    ids, points = set(), {}
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        ids.add(file.stem.removeprefix("run-"))
        for record in ended_records(file):
            if record.HasField("history"):
                row = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }
                for name, value in row.items():
                    if not name.startswith("_"):
                        points.setdefault(name, []).append((row["_step"], value))
    return ids, points


def ended_records(file: Path) -> list:
    """The records of a run that has ended; wandb's own process may write the last ones a moment after its answer."""
    deadline = time.monotonic() + 30
    while True:
        records = list(offline_records(file.read_bytes()))
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < deadline, f"{file} does not end"
        time.sleep(0.05)


def offline_records(data: bytes) -> Iterator:
    """The records of a `.wandb` file: protobuf messages in LevelDB's log format, blocks of 32 KiB behind 7 bytes.

    A chunk is checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last), payload.
    """
    from wandb.proto import wandb_internal_pb2

    position, message = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if position + 7 + length > len(data):
            return  # still being written
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record
            message = b""


def warm_up_tracked(tmp_path: Path, *overrides: str) -> tuple[Path, list[dict], RunConfig]:
    """The real warm-up step on a few examples; its output, its rows, its config."""
    data = write_prepared(tmp_path / "run" / "data_prep")
    config = tiny_config("sft_warmup.validate_every=2", *overrides)
    output = tmp_path / "run" / "sft_warmup"
    execute(SFT_WARMUP, config, {"data": str(data)}, str(output))
    return output, [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()], config


def test_training_in_both_trackers(tmp_path):
    store = tmp_path / "mlruns"
    output, rows, config = warm_up_tracked(
        tmp_path, f"tracking.mlflow={{uri='{store}'}}", "tracking.wandb={mode='offline'}"
    )
    expected: Points = {}
    for row in rows:
        for name, value in row.items():
            if name != "update":
                expected.setdefault(name, []).append((row["update"], value))
    assert expected["loss/validation"][0][0] == 0
    assert len(expected["loss/train"]) == config.sft_warmup.updates
    statuses, points, parameters = in_mlflow(str(store))
    assert statuses == ["FINISHED"]
    assert points == expected
    assert parameters["lora.rank"] == str(config.lora.rank)
    assert parameters["model.uri"] == config.model.uri
    ids, points = in_wandb(output)
    assert ids == {json.loads((output / "wandb.json").read_text())["id"]}
    assert points == expected


def test_resumed_run_is_one_run_without_doubles(tmp_path):
    log = tmp_path / "metrics.jsonl"
    settings = TrackingSettings(
        mlflow=MlflowSettings(uri=str(tmp_path / "mlruns")), wandb=WandbSettings(mode="offline")
    )
    with contextlib.suppress(TryAgain), tracked(settings, tmp_path, group="g", step="s", resolved={}):
        append(log, 0, 1, 2, 3, 4)
        raise TryAgain("stopped")
    assert in_mlflow(str(tmp_path / "mlruns"))[0] == ["KILLED"]
    kept = "".join(log.read_text().splitlines(keepends=True)[:3])
    log.write_text(kept)  # as a checkpoint of update 2 does
    with tracked(settings, tmp_path, group="g", step="s", resolved={}):
        append(log, 3, 4, 5, 6)
    statuses, points, _ = in_mlflow(str(tmp_path / "mlruns"))
    assert statuses == ["FINISHED"]
    assert points["reward/mean"] == [(update, update / 10) for update in range(7)]
    ids, points = in_wandb(tmp_path)
    assert len(ids) == 1
    assert sorted(points["reward/mean"]) == [(update, update / 10) for update in range(7)]


KILLED = """
import sys, time
from pathlib import Path
from tests.components.test_tracking import append
from tuneloop.tracking import delivery, tracked
from tuneloop.tracking.settings import MlflowSettings, TrackingSettings
delivery.POLL_SECONDS = 0.01
folder = Path(sys.argv[1])
settings = TrackingSettings(mlflow=MlflowSettings(uri=str(folder / "mlruns")))
with tracked(settings, folder, group="g", step="s", resolved={}):
    for update in range(2000):
        append(folder / "metrics.jsonl", update)
        time.sleep(0.005)
"""


def test_killed_while_sending(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    record = tmp_path / "mlflow.json"
    deadline = time.monotonic() + 60
    while not (record.exists() and json.loads(record.read_text())["update"] >= 20):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # As if it had been killed between sending and noting it: MLflow itself knows better.
    record.write_text(json.dumps(json.loads(record.read_text()) | {"update": 3}))
    written = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    settings = TrackingSettings(mlflow=MlflowSettings(uri=str(tmp_path / "mlruns")))
    with tracked(settings, tmp_path, group="g", step="s", resolved={}):
        append(tmp_path / "metrics.jsonl", written)
    statuses, points, _ = in_mlflow(str(tmp_path / "mlruns"))
    assert statuses == ["FINISHED"]
    assert [step for step, _ in points["time"]] == list(range(written + 1))


def test_unreachable_server_does_not_stop_training(tmp_path, capfd, monkeypatch):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.monotonic()
    output, rows, _ = warm_up_tracked(tmp_path, f"tracking.mlflow={{uri='{uri}'}}")
    assert (output / "step.json").exists()
    assert len(rows) == 3
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("tracking:")]
    assert said[0] == f"tracking: MLflow at {uri}"
    assert re.match(r"tracking: mlflow fails \(MlflowException: .*\); training goes on$", said[1])
    assert said[2:] == ["tracking: mlflow has not got everything (3 updates); metrics.jsonl has"]
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            TrackingSettings(mlflow=MlflowSettings()),
            "mlflow is off: neither tracking.mlflow.uri nor MLFLOW_",
        ),
        (
            TrackingSettings(wandb=WandbSettings()),
            "wandb is off: no API key; set WANDB_API_KEY, or ",
        ),
        (TrackingSettings(wandb=WandbSettings(mode="disabled")), 'wandb is off: tracking.wandb.mode is "disabled"'),
        (TrackingSettings(mlflow=MlflowSettings(uri="ftp://there")), "mlflow is off: "),
    ],
)
def test_off_with_a_reason(tmp_path, capsys, settings, reason):
    with tracked(settings, tmp_path, group="g", step="s", resolved={}):
        append(tmp_path / "metrics.jsonl", 0)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert reason in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_off_without_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.tracking", None)  # importing it fails, as without the package
    settings = TrackingSettings(mlflow=MlflowSettings(uri=str(tmp_path)))
    with tracked(settings, tmp_path, group="g", step="s", resolved={}):
        pass
    assert "is not installed; pip install 'tuneloop[mlflow]'" in capsys.readouterr().out


def test_api_key_in_the_netrc_file(tmp_path, monkeypatch):
    from tuneloop.tracking.wandb_tracker import has_credentials

    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40 + "\n")
    assert has_credentials()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_credentials()


def test_nothing_is_imported_when_nothing_is_configured():
    code = (
        "import sys; from pathlib import Path; from tuneloop.tracking import tracked\n"
        "from tuneloop.tracking.settings import TrackingSettings\n"
        "with tracked(TrackingSettings(), Path('.'), group='g', step='s', resolved={}): pass\n"
        "sys.exit(bool({'torch', 'mlflow', 'wandb'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


class Late:
    """A tracker that refuses the first calls."""

    label = "late"

    def __init__(self, failures: int):
        self.failures, self.got, self.outcome = failures, [], ""

    def open(self, run: TrackedRun) -> int:
        return -1

    def write(self, update: int, values: Mapping[str, float]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("not yet")
        self.got.append((update, dict(values)))

    def close(self, outcome: Outcome) -> None:
        self.outcome = outcome


def test_what_a_tracker_did_not_take_is_sent_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(delivery, "RETRY_SECONDS", 0.05)
    tracker = Late(failures=3)
    append(tmp_path / "metrics.jsonl", 0, 1)
    sending = Delivery("late", lambda: tracker, tmp_path, lambda i, folder: TrackedRun(i, "n", "g", "s", folder, {}))
    sending.start()
    deadline = time.monotonic() + 20
    while len(tracker.got) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    sending.finish("failed")
    assert [update for update, _ in tracker.got] == [0, 1]
    assert tracker.got[1][1] == {"time": 0.5, "reward/mean": 0.1}
    assert tracker.outcome == "failed"
    assert capsys.readouterr().out.splitlines() == [
        "tracking: late fails (ConnectionError: not yet); training goes on",
        "tracking: late works again",
    ]


def test_each_log_under_the_folder_is_a_run_of_its_own(tmp_path):
    trackers = [Late(0), Late(0)]
    made = iter(trackers)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        append(tmp_path / name / "metrics.jsonl", 0)
    sending = Delivery("late", lambda: next(made), tmp_path, lambda i, folder: TrackedRun(i, "n", "g", "s", folder, {}))
    sending.start()
    sending.finish("finished")
    assert [len(tracker.got) for tracker in trackers] == [1, 1]
    ids = {json.loads((tmp_path / name / "late.json").read_text())["id"] for name in ("one", "two")}
    assert len(ids) == 2


def test_follower_sees_a_file_that_was_cut_back_and_grew_past_its_place(tmp_path):
    log = tmp_path / "metrics.jsonl"
    follower = Follower(log)
    assert list(follower.rows()) == []
    append(log, 0, 1, 2)
    with log.open("a") as file:
        file.write('{"update": 3, "ti')  # a line that is still being written
    assert [row["update"] for row in follower.rows()] == [0, 1, 2]
    with log.open("a") as file:
        file.write('me": 9}\n')
    assert [row["update"] for row in follower.rows()] == [3]
    log.write_text("")
    append(log, 0, 1, 7, 8, 9, 10, 11)
    assert [row["update"] for row in follower.rows()] == [0, 1, 7, 8, 9, 10, 11]


def test_parameters_are_names_that_trackers_accept():
    flat = flatten({"lora": {"rank": 4, "rank_pattern": {"a.*b$": 2}, "modules": ["x"]}, "none": None, "on": True})
    assert flat == {
        "lora.rank": 4,
        "lora.rank_pattern": '{"a.*b$": 2}',
        "lora.modules": '["x"]',
        "none": "null",
        "on": True,
    }


def test_settings_are_refused_in_one_line():
    with pytest.raises(UserError, match=r"tracking.wandb.mode: Input should be 'online', 'offline' or 'disabled'"):
        tiny_config("tracking.wandb={mode='onlin'}")
