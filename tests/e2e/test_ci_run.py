"""configs/ci.toml end to end: a promotion that is earned, and training that no kill changes.

Run times on two idle cores: the pipeline 30 s, the killed trainings 40 s, the rest 20 s.
"""

import importlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from components.config import load_run_config
from components.runner import execute
from pipelines.steps import STEPS
from tests.s3_server import s3_server  # noqa: F401 - a fixture
from tuneloop.models.adapter_io import load_adapter
from tuneloop.models.sources import resolve_model
from tuneloop.storage import open_storage

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "ci.toml"
RL_UPDATES, SFT_UPDATES = 60, 12
CLOCK_AND_MEMORY = ("time", "seconds/", "tokens_per_second/", "memory/")  # columns that differ from run to run


def numbers(row: dict) -> dict:
    """A row of metrics.jsonl without what the machine decides."""
    return {name: value for name, value in row.items() if not name.startswith(CLOCK_AND_MEMORY)}


def metrics(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl; a last one that is still being written does not count."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


# The uninterrupted run


@dataclass(frozen=True)
class Run:
    folder: Path
    registry: Path
    output: str


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("ci")
    command = [sys.executable, "-m", "pipelines", "run", "--config", str(CONFIG), "--output", str(folder / "runs")]
    command += ["--run", "whole", "--set", f"promote.registry={folder / 'registry'}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return Run(folder / "runs" / "whole", folder / "registry", done.stdout)


def test_first_run_promotes_version_1(run):
    assert "promoted: last-digit version 1 is now production" in run.output
    alias = json.loads((run.registry / "last-digit" / "aliases" / "production.json").read_text())
    version = json.loads((run.registry / "last-digit" / "versions" / "1" / "version.json").read_text())
    assert (alias["version"], alias["previous"]) == (1, None)
    registered = load_adapter(run.registry / "last-digit" / "versions" / "1" / "adapter")
    trained = load_adapter(run.folder / "lora_rl" / "adapter")
    assert version["adapter_digest"] == registered.digest() == trained.digest()


def test_reward_rises_in_training(run):
    rows = metrics(run.folder / "lora_rl")
    accuracy = [row["validation/accuracy"] for row in rows if "validation/accuracy" in row]
    reward = [row["reward/mean"] for row in rows if "reward/mean" in row]
    assert accuracy[-1] > accuracy[0] + 0.15, accuracy
    assert sum(reward[-10:]) / 10 > sum(reward[:10]) / 10 + 0.1, reward


def test_candidate_beats_the_warm_up_on_held_out_prompts(run):
    accuracy = json.loads((run.folder / "report.json").read_text())["accuracy"]
    assert accuracy["candidate"]["value"] > accuracy["sft"]["value"] + 0.1
    comparisons = json.loads((run.folder / "evaluate" / "evaluation.json").read_text())["comparisons"]
    [p_value] = [c["p_value"] for c in comparisons if (c["reference"], c["metric"]) == ("sft", "accuracy")]
    assert p_value < 0.01


def test_report_holds_every_key(run):
    report = json.loads((run.folder / "report.json").read_text())
    assert set(report) == {
        "accuracy", "gate", "seconds", "peak_rss_bytes", "adapter_digest", "config_digest", "run", "status", "error",
    }  # fmt: skip
    assert (report["run"], report["status"], report["error"]) == ("whole", "promoted", None)
    assert report["accuracy"].pop("incumbent") is None  # the registry was empty
    assert set(report["accuracy"]) == {"base", "sft", "candidate"}
    for measured in report["accuracy"].values():
        low, high = measured["ci95"]
        assert 0.0 <= low <= measured["value"] <= high <= 1.0
        assert low < high
        assert measured["n"] == 250
    assert report["gate"]["passed"] is True
    assert "beats base" in report["gate"]["reason"]
    assert 0.0 <= report["gate"]["p_value"] < 0.01
    assert set(report["seconds"]) == set(report["peak_rss_bytes"]) == set(STEPS)
    assert all(seconds >= 0.0 for seconds in report["seconds"].values())
    assert all(10e6 < size < 10e9 for size in report["peak_rss_bytes"].values())
    assert report["adapter_digest"] == load_adapter(run.folder / "lora_rl" / "adapter").digest()
    assert report["config_digest"] == json.loads((run.folder / "check" / "step.json").read_text())["config_digest"]


PEERS = """
import json, sys
sys.modules.update(dict.fromkeys(("tuneloop", "components", "pipelines")))  # importing one of them now fails
from pathlib import Path
import pyarrow.parquet, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, run = sys.argv[1], Path(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(run / "merge_adapter" / "model", padding_side="left")
adapted = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
adapted = PeftModel.from_pretrained(adapted, run / "lora_rl" / "adapter")
models = {
    "base": AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
    "adapted": adapted,
    "merged": AutoModelForCausalLM.from_pretrained(run / "merge_adapter" / "model", dtype=torch.float32),
}
rows = pyarrow.parquet.read_table(run / "data_prep" / "test.parquet").to_pylist()
texts = [tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False) for row in rows]
inputs = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
answers = {}
for name, model in models.items():
    tokens = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1]:]
    answers[name] = dict(zip([row["id"] for row in rows], tokenizer.batch_decode(tokens, skip_special_tokens=True)))
print(json.dumps(answers))
"""


def test_peft_and_transformers_alone_give_the_evaluated_answers(run, tmp_path):
    import pyarrow.parquet

    base = resolve_model(load_run_config(CONFIG).model.uri)
    command = [sys.executable, "-I", "-c", PEERS, str(base), str(run.folder)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    rows = pyarrow.parquet.read_table(run.folder / "evaluate" / "answers.parquet").to_pylist()
    greedy = {model: {r["prompt_id"]: r["completion"] for r in rows if r["model"] == model and r["sample"] == -1}
              for model in ("base", "candidate")}  # fmt: skip
    for name, ours in (("base", "base"), ("adapted", "candidate"), ("merged", "candidate")):
        assert theirs[name].keys() == greedy[ours].keys()
        equal = sum(theirs[name][key] == completion for key, completion in greedy[ours].items())
        assert equal >= 0.98 * len(greedy[ours]), (name, equal)  # rounding may decide a tie of two tokens


# The same training, killed


class Training:
    """One training step as its users run it, killed and started again with the same command."""

    def __init__(self, step: str, run: Run, folder: Path, *sets: str):
        self.output, self.log = folder / step, folder / f"{step}.log"
        self.partial = folder / f"{step}.partial"
        self.command = [sys.executable, "-m", f"components.{step}", "--config", str(CONFIG)]
        for name, source in STEPS[step].items():
            self.command += [f"--{name}", str(run.folder / source)]
        self.command += ["--output", str(self.output), *(part for value in sets for part in ("--set", value))]
        self.killed_after: list[int] = []

    def start(self) -> subprocess.Popen:
        with open(self.log, "w") as log:
            return subprocess.Popen(self.command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT)

    def kill_after(self, update: int, fraction: float = 0.0) -> None:
        """Start it, and SIGKILL it when the row of `update` is written and that fraction of another update is made."""
        process = self.start()
        while process.poll() is None and self._last() < update:
            time.sleep(0.002)
        *_, before, last = [{"time": 0.0}, *metrics(self.partial)]
        time.sleep(fraction * (last["time"] - before["time"]))
        process.kill()
        assert process.wait() == -signal.SIGKILL, f"ended by itself before update {update}:\n{self.log.read_text()}"
        assert not self.output.exists()
        self.killed_after.append(self._last())

    def finish(self) -> Path:
        assert self.start().wait() == 0, self.log.read_text()
        return self.output

    def continued_from(self) -> int:
        """The update of the checkpoint from which the last process went on; 0 when there was none."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("continuing from")]
        return int(lines[0].rpartition(" ")[2].rstrip(".")) if lines else 0

    def _last(self) -> int:
        return max((row["update"] for row in metrics(self.partial)), default=-1)


@dataclass(frozen=True)
class Story:
    """A finished training, after which updates it was killed, and from which each process but the first went on."""

    output: Path
    killed_after: list[int]
    continued_from: list[int]


@pytest.fixture(scope="module")
def killed_rl(run, tmp_path_factory) -> Story:
    """Four kills: before any checkpoint, between two, when one is to be saved, and later; two at random instants."""
    training = Training("lora_rl", run, tmp_path_factory.mktemp("killed"), "lora_rl.checkpoint_every=5")
    continued = []
    plan = [(2, 0.0), (random.randint(11, 14), random.random()), (25, 0.0), (random.randint(31, 48), random.random())]
    print("to be killed after (update, fraction of another):", plan)
    for update, fraction in plan:
        training.kill_after(max([update, *(last + 1 for last in training.killed_after[-1:])]), fraction)
        continued.append(training.continued_from())
    output = training.finish()
    return Story(output, training.killed_after, [*continued[1:], training.continued_from()])


@pytest.fixture(scope="module")
def killed_sft(run, tmp_path_factory) -> Story:
    training = Training("sft_warmup", run, tmp_path_factory.mktemp("killed"), "sft_warmup.checkpoint_every=2")
    training.kill_after(3)
    output = training.finish()
    return Story(output, training.killed_after, [training.continued_from()])


def test_killed_rl_goes_on_from_its_checkpoints(killed_rl):
    first, *later = killed_rl.continued_from
    assert first == 0 or killed_rl.killed_after[0] >= 5
    for killed_after, continued_from in zip(killed_rl.killed_after[1:], later, strict=True):
        assert 0 <= killed_after - continued_from <= 5, (
            killed_rl
        )  # 5: killed before the save behind the row was complete
        assert continued_from > 0
    assert len(set(killed_rl.killed_after)) == 4


def test_killed_rl_ends_with_the_same_adapter(run, killed_rl):
    whole, resumed = (
        json.loads((folder / "rl.json").read_text()) for folder in (run.folder / "lora_rl", killed_rl.output)
    )
    assert resumed == whole
    assert load_adapter(killed_rl.output / "adapter").digest() == whole["adapter_digest"]


def test_killed_rl_logs_every_update_once(run, killed_rl):
    rows, expected = metrics(killed_rl.output), metrics(run.folder / "lora_rl")
    assert [row["update"] for row in rows] == list(range(RL_UPDATES + 1))
    assert [numbers(row) for row in rows] == [numbers(row) for row in expected]
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    samples = [(folder / "samples.jsonl").read_bytes() for folder in (killed_rl.output, run.folder / "lora_rl")]
    assert samples[0] == samples[1]


def test_killed_rl_shows_every_update_once_in_tensorboard(killed_rl):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(killed_rl.output / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")] == list(range(1, RL_UPDATES + 1))
    assert [event.step for event in events.Scalars("validation/accuracy")] == list(range(0, RL_UPDATES + 1, 10))


def test_killed_warm_up_ends_with_the_same_adapter(run, killed_sft):
    assert 2 <= killed_sft.continued_from[0] <= killed_sft.killed_after[0] < SFT_UPDATES
    whole = run.folder / "sft_warmup"
    assert (killed_sft.output / "warmup.json").read_text() == (whole / "warmup.json").read_text()
    assert load_adapter(killed_sft.output / "adapter").digest() == load_adapter(whole / "adapter").digest()
    rows = metrics(killed_sft.output)
    assert [row["update"] for row in rows] == list(range(SFT_UPDATES + 1))
    assert [numbers(row) for row in rows] == [numbers(row) for row in metrics(whole)]


def test_kill_behind_the_last_update_costs_nothing(run, tmp_path):
    """Every update is made and saved, but the adapter is not written yet: no kill can be aimed at it, so it is made."""
    step = importlib.import_module("components.lora_rl.step").STEP
    inputs = {name: run.folder / source for name, source in STEPS["lora_rl"].items()}
    config = load_run_config(CONFIG, ("lora_rl.updates=6", "lora_rl.checkpoint_every=5"))
    output = tmp_path / "lora_rl"
    output.mkdir()
    step.run(config, inputs, output)
    files = [output / name for name in ("metrics.jsonl", "samples.jsonl", "rl.json")]
    written, digest = [file.read_bytes() for file in files], load_adapter(output / "adapter").digest()
    shutil.rmtree(output / "adapter")
    (output / "rl.json").unlink()
    step.run(config, inputs, output)
    # The rows hold wall-clock times: equal bytes mean that no update was made again.
    assert [file.read_bytes() for file in files] == written
    assert load_adapter(output / "adapter").digest() == digest


# The same training again, and another one


def test_step_alone_trains_the_adapter_of_the_pipeline(run, tmp_path):
    alone = Training("lora_rl", run, tmp_path).finish()
    assert (alone / "rl.json").read_text() == (run.folder / "lora_rl" / "rl.json").read_text()
    assert load_adapter(alone / "adapter").digest() == load_adapter(run.folder / "lora_rl" / "adapter").digest()


def test_another_seed_trains_another_adapter(run, tmp_path):
    step = importlib.import_module("components.lora_rl.step").STEP
    inputs = {name: str(run.folder / source) for name, source in STEPS["lora_rl"].items()}

    def train(name: str, seed: int) -> tuple[str, list[dict]]:
        config = load_run_config(CONFIG, ("lora_rl.updates=3", f"seed={seed}"))
        execute(step, config, inputs, str(tmp_path / name))
        return load_adapter(tmp_path / name / "adapter").digest(), [numbers(row) for row in metrics(tmp_path / name)]

    first, again, other = train("first", 17), train("again", 17), train("other", 18)
    assert first == again
    assert first[0] != other[0]
    assert first[1][1] != other[1][1]


# The same pipeline with everything in an object store


def stored(uri: str) -> dict[str, bytes]:
    """Every object below a URI."""
    storage = open_storage(uri)
    return {key: storage.read_bytes(key) for key in storage.list()}


def test_object_store_that_stumbles_gives_the_same_adapter(run, s3_server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TUNELOOP_CACHE", str(tmp_path / "cache"))
    s3_server.trouble = True
    command = [sys.executable, "-m", "pipelines", "run", "--config", str(CONFIG), "--output", "s3://models/runs"]
    command += ["--run", "whole", "--set", "promote.registry=s3://models/registry"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    s3_server.trouble = False
    assert min(s3_server.troubles[kind] for kind in ("503", "broken", "slow")) > 0, s3_server.troubles
    assert "report: s3://models/runs/whole/report/report.html" in done.stdout

    objects = stored("s3://models/runs/whole")
    assert json.loads(objects["lora_rl/rl.json"]) == json.loads((run.folder / "lora_rl" / "rl.json").read_text())
    adapter = "adapter/adapter_model.safetensors"
    assert objects[f"lora_rl/{adapter}"] == (run.folder / "lora_rl" / adapter).read_bytes()
    assert stored("s3://models/registry")[f"last-digit/versions/1/{adapter}"] == objects[f"lora_rl/{adapter}"]
    local = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()}
    assert {key for key in objects if "tensorboard" not in key} == {n for n in local if "tensorboard" not in n}
    assert any("lora_rl.partial/checkpoints" in path for method, path in s3_server.requests if method == "PUT")
    assert not list((tmp_path / "cache").glob("outputs/*/*"))  # this machine keeps copies of inputs only


def test_training_goes_on_on_another_machine(run, s3_server, tmp_path, monkeypatch):  # noqa: F811
    training = Training("lora_rl", run, tmp_path, "lora_rl.checkpoint_every=5")
    training.command[training.command.index("--output") + 1] = "s3://models/runs/killed/lora_rl"
    monkeypatch.setenv("TUNELOOP_CACHE", str(tmp_path / "first"))
    process = training.start()
    checkpoints = open_storage("s3://models/runs/killed/lora_rl.partial/checkpoints")
    while not any(key.endswith("COMMITTED") for key in checkpoints.list()):
        assert process.poll() is None, training.log.read_text()
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    monkeypatch.setenv("TUNELOOP_CACHE", str(tmp_path / "second"))
    assert training.start().wait() == 0, training.log.read_text()
    assert "fetched update-0000" in training.log.read_text()
    assert training.continued_from() >= 5
    objects = stored("s3://models/runs/killed")
    assert json.loads(objects["lora_rl/rl.json"]) == json.loads((run.folder / "lora_rl" / "rl.json").read_text())
    assert not [key for key in objects if key.startswith("lora_rl.partial")]
