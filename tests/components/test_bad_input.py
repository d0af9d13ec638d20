"""One table of what a user can get wrong, run through the steps' own command lines.

Every case must end with exit code 2, print exactly one line that names what to change, and leave every file as it was.
"""

# ruff: noqa: E501 - a table: one mistake a row

import gzip
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from components.runner import execute
from components.step_command import main
from pipelines.steps import STEPS
from tests.tiny_run import tiny_config, tiny_toml
from tuneloop.models.sources import resolve_model

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD_ROW = b'{"prompt": "1 + 1 =", "answer": "2"}\n'
GOOD_ROWS = b"".join(b'{"prompt": "%d + 1 =", "answer": "%d"}\n' % (n, n + 1) for n in range(40))


@dataclass(frozen=True)
class Case:
    """One mistake.

    Attributes:
        says: a regular expression that the error line must match.
        set: overrides; $TMP stands for the case's folder.
        files: made in the case's folder before the step runs.
        arrange: does to the case's folder what bytes cannot say.
        inputs: replaces an input of the step; $TMP as above.
        config: replaces the config file.
        output: where the step is told to write.
    """

    name: str
    step: str
    says: str
    set: tuple[str, ...] = ()
    files: dict[str, bytes] = field(default_factory=dict)
    arrange: Callable[[Path], None] | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    config: str = ""
    output: str = "$TMP/out"


def jsonl(path: str = "$TMP/rows.jsonl", **settings: str) -> str:
    options = "".join(f", {key}={json.dumps(value)}" for key, value in settings.items())
    return f'data_prep.sources=[{{kind="jsonl", uri="{path}"{options}}}]'


def gym(task: str = "chain_sum", options: str = "{}") -> str:
    return f'data_prep.sources=[{{kind="reasoning_gym", task="{task}", size=300, options={options}}}]'


def reward(function: str) -> str:
    return f'task.rewards=[{{kind="python", function="{function}"}}]'


def copied_model(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def arrange(folder: Path) -> None:
        shutil.copytree(resolve_model("tiny://qwen2?seed=0"), folder / "model")
        change(folder / "model")

    return arrange


def without_chat_template(model: Path) -> None:
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))


def masked_language_model(model: Path) -> None:
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "architectures": ["BertForMaskedLM"]}))


def cut_off_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def finished_elsewhere(folder: Path) -> None:
    """An output of this very step, made from other settings."""
    step = importlib.import_module("components.check.step").STEP
    execute(step, tiny_config("lora.rank=2"), {}, str(folder / "out"))


def warm_up_of(model_uri: str, folder: Path, recorded_uri: str = "tiny://qwen2?seed=0") -> None:
    """A fresh adapter for a model, as `sft_warmup` leaves it; `recorded_uri` is the base that its record names."""
    from tuneloop.models.adapter_io import save_adapter
    from tuneloop.models.load import load_model
    from tuneloop.models.lora import attach, extract, peft_config

    lora = tiny_config().lora
    model = load_model(resolve_model(model_uri), "float32", "cpu")
    layers = attach(model, lora, seed=0)
    save_adapter(extract(layers, peft_config(lora, layers, model, model_uri)), folder / "warmup" / "adapter")
    record = {"base_uri": recorded_uri, "parameters": 1_000_000, "lora": lora.model_dump(mode="json")}
    (folder / "warmup" / "warmup.json").write_text(json.dumps(record))


def adapter_for_another_base(folder: Path) -> None:
    warm_up_of("tiny://qwen2?hidden_size=32", folder)


def adapter_for_more_layers(folder: Path) -> None:
    warm_up_of("tiny://qwen2?layers=3", folder)


def warm_up_of_another_base(folder: Path) -> None:
    warm_up_of("tiny://qwen2?seed=1", folder, "tiny://qwen2?seed=1")


def warm_up_without_record(folder: Path) -> None:
    warm_up_of("tiny://qwen2", folder)
    (folder / "warmup" / "warmup.json").unlink()


def warm_up_without_chat_template(folder: Path) -> None:
    copied_model(without_chat_template)(folder)
    warm_up_of(str(folder / "model"), folder, str(folder / "model"))


def damaged_adapter(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def arrange(folder: Path) -> None:
        warm_up_of("tiny://qwen2", folder)
        path = folder / "warmup" / "adapter" / name
        path.write_bytes(change(path.read_bytes()))

    return arrange


def without_setting(name: str) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({key: value for key, value in json.loads(data).items() if key != name}).encode()


def adapter_without_record(folder: Path) -> None:
    adapter_for_another_base(folder)
    (folder / "warmup").rename(folder / "training")


def exchanged_adapter(folder: Path) -> None:
    adapter_without_record(folder)
    record = {"updates": 1, "adapter_digest": "0" * 64, "base_uri": "tiny://qwen2?seed=0"}
    (folder / "training" / "rl.json").write_text(json.dumps(record))


MODEL = "model.uri=$TMP/model"
WARMUP = {"warmup": "$TMP/warmup"}
OLD_CONFIG = '[model]\nuri = "tiny://qwen2"\n[task]\n'

CASES = (
    # The config
    Case("no config file", "check", "none.toml: no such config file", config="$TMP/none.toml"),
    Case("binary config", "check", "cannot be read as text", files={"x.toml": b"\xff\xfe\x00"}, config="$TMP/x.toml"),
    Case("config is not TOML", "check", "not valid TOML", files={"x.toml": b"[model\n"}, config="$TMP/x.toml"),
    Case("config is not JSON", "check", "not valid JSON", files={"x.json": b"{,}"}, config="$TMP/x.json"),
    Case("config is a list", "check", "expected a table", files={"x.json": b"[1]"}, config="$TMP/x.json"),
    Case("missing section", "check", "required, but not given", files={"x.toml": OLD_CONFIG.encode()}, config="$TMP/x.toml"),
    Case("empty config", "check", "name: required", files={"x.toml": b""}, config="$TMP/x.toml"),
    Case("unknown key", "check", "lora.rnak: unknown key; did you mean 'rank'", set=("lora.rnak=4",)),
    Case("unknown section", "check", "rewards: unknown key", set=("rewards.kind=exact",)),
    Case("override without a value", "check", "write it as section.key=value", set=("seed",)),
    Case("override through a value", "check", "'name' is a value, not a section", set=("name.x=1",)),
    Case("rank 0", "check", r"lora.rank: .*greater than or equal to 1 \(got 0\)", set=("lora.rank=0",)),
    Case("negative seed", "check", "seed: .*greater than or equal to 0", set=("seed=-1",)),
    Case("text for a number", "check", "lora_rl.updates: .*integer", set=("lora_rl.updates=ten",)),
    Case("fraction for a count", "check", "sft_warmup.updates: .*integer", set=("sft_warmup.updates=1.5",)),
    Case("learning rate above 1", "check", "learning_rate: .*less than or equal to 1", set=("lora_rl.optimizer.learning_rate=3",)),
    Case("learning rate nan", "check", "learning_rate", set=("lora_rl.optimizer.learning_rate=nan",)),
    Case("no path in a name", "check", "promote.adapter_name", set=("promote.adapter_name=../x",)),
    Case("shares above 1", "check", "nothing is left to train on", set=("data_prep.test_share=0.9", "data_prep.validation_share=0.1")),
    Case("prompt longer than the context", "check", "exceeds model.max_length = 160", set=("data_prep.max_prompt_tokens=153",)),
    Case("greedy rollouts", "check", "no advantage: use 1.0", set=("lora_rl.sampling.temperature=0.0",)),
    Case("group of one", "check", "group_size: .*greater than or equal to 2", set=("lora_rl.group_size=1",)),
    Case("more minibatches than prompts", "check", "cannot exceed prompts_per_update", set=("lora_rl.algorithm.minibatches=5",)),
    Case("estimator without a gradient", "check", "use k2 or k3", set=("lora_rl.algorithm.kl_coefficient=0.1", "lora_rl.algorithm.kl_estimator=k1")),
    Case("unknown reward", "check", r"task.rewards.0.kind: .*'exact'", set=('task.rewards=[{kind="vibes"}]',)),
    Case("no reward", "check", "task.rewards: .*at least 1", set=("task.rewards=[]",)),
    Case("rewards of one name", "check", "two rewards share a name", set=('task.rewards=[{kind="exact"}, {kind="exact"}]',)),
    Case("format reward without a pattern", "check", "needs `pattern`", set=('task.rewards=[{kind="format"}]',)),
    Case("python reward without a module", "check", "package.module:function", set=(reward("score"),)),
    Case("template without the prompt", "check", r"must contain \{prompt\}", set=(jsonl(template="Solve!"),)),
    Case("source without a uri", "check", "a jsonl source needs `uri`", set=(jsonl(""),)),
    Case("no source", "check", "data_prep.sources: .*at least 1", set=("data_prep.sources=[]",)),
    # What check finds around the config
    Case("guard on an unknown metric", "check", "'length' is not measured", set=('evaluate.gate.guards=[{metric="length"}]',)),
    Case("too few held-out prompts", "check", "raise a source's size or test_share", set=("evaluate.prompts=900", "evaluate.min_prompts=500")),
    Case("pattern that does not compile", "check", "not a regular expression", set=('task.rewards=[{kind="format", pattern="(x"}]',)),
    Case("reward module missing", "check", "No module named 'nowhere'", set=(reward("nowhere:score"),)),
    Case("reward function missing", "check", "json has no 'score'", set=(reward("json:score"),)),
    Case("reward that cannot be called", "check", "cannot be called", set=(reward("json:__doc__"),)),
    Case("reward of another source", "check", "put another reward first", set=('task.rewards=[{kind="reasoning_gym"}]', jsonl()), files={"rows.jsonl": GOOD_ROWS}),
    Case("target modules match nothing", "check", r"'query' matches no linear layer; known: down_proj", set=('lora.target_modules=["query"]',)),
    Case("everything excluded", "check", "matches no linear layer", set=('lora.exclude_modules=[".*"]',)),
    Case("target that is no pattern", "check", "no regular expression", set=('lora.target_modules=["(q"]',)),
    Case("rank above the matrix", "check", r"lora.rank = 33 exceeds .*k_proj's smaller side \(32\)", set=("lora.rank=33",)),
    Case("model folder missing", "check", "no such folder", set=("model.uri=$TMP/none",)),
    Case("model of an unknown scheme", "check", "unknown kind of model", set=("model.uri=ftp://x/y",)),
    Case("model folder without a model", "check", "config.json is missing", set=("model.uri=$TMP",)),
    Case("masked language model", "check", "not a causal language model", set=(MODEL,), arrange=copied_model(masked_language_model)),
    Case("weights cut off", "check", "cut off, .* fetch the model again", set=(MODEL,), arrange=copied_model(cut_off_weights)),
    Case("no chat template", "check", "no chat template", set=(MODEL,), arrange=copied_model(without_chat_template)),
    Case("context longer than the model's", "check", "exceeds the 512 positions", set=("model.max_length=513",)),
    Case("unknown data set", "check", "no task 'chain_sun'; .*chain_sum", set=(gym("chain_sun"),)),
    Case("unknown data set option", "check", "no option 'terms'", set=(gym(options="{terms=2}"),)),
    Case("data set option out of bounds", "check", "refuses its options", set=(gym(options="{min_terms=5, max_terms=2}"),)),
    Case("data missing", "check", "rows.jsonl: no such file", set=(jsonl(),)),
    Case("data empty", "check", "is empty", set=(jsonl(),), files={"rows.jsonl": b""}),
    Case("registry is a file", "check", "is a file; name a folder", set=("promote.registry=$TMP/reg",), files={"reg": b"x"}),
    Case("registry of an unknown scheme", "check", "only local paths", set=("promote.registry=ftp://x",)),
    Case("not enough disk", "check", "free space or choose another output", set=("check.min_free_disk_bytes=1000000000000000",)),
    # The output
    Case("output exists", "check", "out: already holds a check output", arrange=finished_elsewhere),
    Case("output is not ours", "check", "holds no finished step", files={"out/thesis.txt": b"x"}),
    Case("output is a file", "check", "holds no finished step", files={"out": b"x"}),
    Case("output below a file", "check", "cannot be made", files={"file": b"x"}, output="$TMP/file/out"),
    Case("output of an unknown scheme", "check", "only local paths", output="gs://bucket/out"),
    # Data
    Case("no rows in the file", "data_prep", "the file is empty", set=(jsonl(),), files={"rows.jsonl": b""}),
    Case("file is missing", "data_prep", "rows.jsonl: no such file", set=(jsonl(),)),
    Case("folder for a file", "data_prep", "a folder; name a file", set=(jsonl("$TMP"),)),
    Case("binary data", "data_prep", "a binary file", set=(jsonl(),), files={"rows.jsonl": b"\x00\x01\x02\xff" * 99}),
    Case("gzip without its name", "data_prep", "ends in .gz", set=(jsonl(),), files={"rows.jsonl": gzip.compress(GOOD_ROWS)}),
    Case("damaged gzip", "data_prep", "damaged gzip", set=(jsonl("$TMP/x.jsonl.gz"),), files={"x.jsonl.gz": gzip.compress(GOOD_ROWS)[:-30]}),
    Case("parquet that is none", "data_prep", "cannot be read as parquet", set=('data_prep.sources=[{kind="parquet", uri="$TMP/x"}]',), files={"x": GOOD_ROWS}),
    Case("malformed lines", "data_prep", r"1 of 41 rows are bad, more than data_prep.quarantine_share = 0.01", set=(jsonl(),), files={"rows.jsonl": GOOD_ROWS + b'{"prompt": \n'}),
    Case("wrong schema", "data_prep", "prompt", set=(jsonl(),), files={"rows.jsonl": b'{"question": "1", "answer": "2"}\n' * 40}),
    Case("answer missing", "data_prep", "answer", set=(jsonl(),), files={"rows.jsonl": b'{"prompt": "1"}\n' * 40}),
    Case("every prompt too long", "data_prep", "every prompt is longer than data_prep.max_prompt_tokens = 8", set=("data_prep.max_prompt_tokens=8",)),
    Case("no row left to train on", "data_prep", "none is left to train on|no row is left", set=(jsonl(), "data_prep.test_share=0.9"), files={"rows.jsonl": GOOD_ROW}),
    # Training
    Case("input missing", "sft_warmup", "--data .*none: does not exist", inputs={"data": "$TMP/none"}),
    Case("input not prepared", "sft_warmup", "train.parquet: no such file; run the data_prep step", inputs={"data": "$TMP"}),
    Case("prepared data damaged", "sft_warmup", "cannot be read as parquet", inputs={"data": "$TMP"}, files={"train.parquet": b"PAR1" * 9}),
    Case("no chat template", "sft_warmup", "no chat template", set=(MODEL,), arrange=copied_model(without_chat_template)),
    Case("rank above the matrix", "sft_warmup", r"lora.rank = 33 exceeds .*k_proj's smaller side \(32\)", set=("lora.rank=33",)),
    Case("everything excluded", "sft_warmup", "matches no linear layer", set=('lora.exclude_modules=[".*"]',)),
    Case("weights cut off", "sft_warmup", "model.safetensors: cut off", set=(MODEL,), arrange=copied_model(cut_off_weights)),
    Case("input not prepared", "lora_rl", "train.parquet: no such file; run the data_prep step", inputs={"data": "$TMP"}),
    Case("warm-up missing", "lora_rl", "--warmup .*none: does not exist", inputs={"warmup": "$TMP/none"}),
    Case("no adapter", "lora_rl", "not an adapter folder", inputs={"warmup": "$TMP"}),
    Case("adapter for another base", "lora_rl", "made for another base: .*another shape", inputs=WARMUP, arrange=adapter_for_another_base),
    Case("adapter for more layers", "lora_rl", "made for another base: .*no linear layer", inputs=WARMUP, arrange=adapter_for_more_layers),
    Case("warm-up of another base", "lora_rl", "was made with model.uri = 'tiny://qwen2.seed=1'", inputs=WARMUP, arrange=warm_up_of_another_base),
    Case("warm-up of another rank", "lora_rl", "was made with lora.rank = 4, but the config says 8", set=("lora.rank=8",)),
    Case("warm-up without its record", "lora_rl", "no readable warmup.json", inputs=WARMUP, arrange=warm_up_without_record),
    Case("adapter cut off", "lora_rl", "the adapter is damaged", inputs=WARMUP, arrange=damaged_adapter("adapter_model.safetensors", lambda data: data[:-100])),
    Case("adapter emptied", "lora_rl", "the adapter is damaged", inputs=WARMUP, arrange=damaged_adapter("adapter_model.safetensors", lambda data: b"")),
    Case("adapter settings damaged", "lora_rl", "the adapter is damaged", inputs=WARMUP, arrange=damaged_adapter("adapter_config.json", lambda data: data[:-9])),
    Case("adapter settings are a list", "lora_rl", "the adapter is damaged", inputs=WARMUP, arrange=damaged_adapter("adapter_config.json", lambda data: b"[]")),
    Case("adapter settings without alpha", "lora_rl", "the adapter is damaged .*lora_alpha", inputs=WARMUP, arrange=damaged_adapter("adapter_config.json", without_setting("lora_alpha"))),
    Case("adapter of another kind", "lora_rl", "only LoRA is supported", inputs=WARMUP, arrange=damaged_adapter("adapter_config.json", lambda data: data.replace(b"LORA", b"IA3"))),
    Case("no chat template", "lora_rl", "no chat template", set=(MODEL,), inputs=WARMUP, arrange=warm_up_without_chat_template),
    Case("completions cut off", "lora_rl", "cut off at task.max_new_tokens = 8, more than lora_rl.max_truncated_share = 0%", set=("lora_rl.max_truncated_share=0.0",)),
    Case("reward raises", "lora_rl", "reward 'python' failed on example .*ZeroDivisionError", set=(reward("bad_rewards:divide"),)),
    Case("reward returns nan", "lora_rl", "reward 'python' returned nan", set=(reward("bad_rewards:nan"),)),
    Case("reward returns text", "lora_rl", "not a number", set=(reward("bad_rewards:text"),)),
    Case("reward above 1", "lora_rl", r"outside \[0, 1\]", set=(reward("bad_rewards:ten"),)),
    Case("reward raises in the middle", "lora_rl", "reward 'python' failed on example .*ZeroDivisionError", set=(reward("bad_rewards:divide_later"),)),
    Case("reward returns nan in the middle", "lora_rl", "reward 'python' returned nan", set=(reward("bad_rewards:nan_later"),)),
    # Merging
    Case("training missing", "merge_adapter", "rl.json: missing or damaged", inputs={"training": "$TMP"}),
    Case("adapter exchanged after training", "merge_adapter", "is not the adapter that rl.json names", inputs={"training": "$TMP/training"}, arrange=exchanged_adapter),
    # Evaluation and promotion
    Case("fewer held-out prompts than demanded", "evaluate", "held-out prompts, fewer than evaluate.min_prompts = 250", set=("evaluate.prompts=250", "evaluate.min_prompts=250"), inputs={"training": "$TMP"}),
    Case("candidate without its record", "evaluate", "rl.json: missing or damaged", inputs={"training": "$TMP/training"}, arrange=adapter_without_record),
    Case("not an evaluation", "promote", "evaluation.json", inputs={"evaluation": "$TMP", "training": "$TMP", "merge": "$TMP"}),
    Case("damaged evaluation", "promote", "evaluation.json", inputs={"evaluation": "$TMP", "training": "$TMP", "merge": "$TMP"}, files={"evaluation.json": b'{"gate": 1}'}),
)  # fmt: skip

BAD_REWARDS = """
def divide(completion, answer, metadata): return 1 / 0
def nan(completion, answer, metadata): return float("nan")
def text(completion, answer, metadata): return "good"
def ten(completion, answer, metadata): return 10

FIRST_UPDATES_CALLS = 4 + 4 * 2  # the validation before training, and the completions of the first update
calls = 0

def later(bad):
    global calls
    calls += 1
    return bad() if calls > FIRST_UPDATES_CALLS + 3 else calls % 2

def divide_later(completion, answer, metadata): return later(lambda: 1 / 0)
def nan_later(completion, answer, metadata): return later(lambda: float("nan"))
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Inputs without a mistake: data, and a fresh adapter as a warm-up of no updates leaves it."""
    folder = tmp_path_factory.mktemp("good")
    config = tiny_config("sft_warmup.updates=0")
    for name in ("data_prep", "sft_warmup"):
        step = importlib.import_module(f"components.{name}.step").STEP
        inputs = {key: str(folder / source) for key, source in STEPS[name].items()}
        execute(step, config, inputs, str(folder / name))
    return folder


@pytest.fixture(scope="module", autouse=True)
def bad_rewards(tmp_path_factory) -> Iterator[None]:
    """A module of reward functions that misbehave."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "bad_rewards.py").write_text(BAD_REWARDS)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the files' bytes."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def arguments_of(case: Case, folder: Path, good: Callable[[], Path]) -> list[str]:
    def here(text: str) -> str:
        return text.replace("$TMP", str(folder))

    arguments = ["--config", here(case.config) or str(tiny_toml(folder)), "--output", here(case.output)]
    for name, source in STEPS[case.step].items():
        given = here(case.inputs[name]) if name in case.inputs else str(good() / source)
        arguments += [f"--{name}", given]
    return [*arguments, *(part for override in case.set for part in ("--set", here(override)))]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.step}: {case.name}")
def test_mistake_is_one_line_and_leaves_nothing(case, tmp_path, capfd, request):
    for name, data in case.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    if case.arrange:
        case.arrange(tmp_path)
    arguments = arguments_of(case, tmp_path, lambda: request.getfixturevalue("good"))
    step = importlib.import_module(f"components.{case.step}.step").STEP
    if "later" in str(case.set):
        importlib.import_module("bad_rewards").calls = 0
    before = contents(tmp_path)
    capfd.readouterr()
    code = main(step, arguments)
    error = capfd.readouterr().err
    assert code == 2, error
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    assert re.search(case.says, error), error
    assert contents(tmp_path) == before


def test_mistake_after_a_checkpoint_keeps_it_and_the_same_command_continues(tmp_path, capfd, request):
    """The reward fails in the second update; once its function is mended, only that update is left to make."""
    rewards = importlib.import_module("bad_rewards")
    case = Case("", "lora_rl", "", set=(reward("bad_rewards:divide_later"), "lora_rl.checkpoint_every=1"))
    arguments = arguments_of(case, tmp_path, lambda: request.getfixturevalue("good"))
    step = importlib.import_module("components.lora_rl.step").STEP
    rewards.calls = 0
    assert main(step, arguments) == 2
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out.partial" / "checkpoints").iterdir()] == ["update-000001"]
    rewards.calls = -1000
    assert main(step, arguments) == 0
    assert "continuing from the checkpoint of update 1" in capfd.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [0, 1, 2]
    assert rewards.calls == -1000 + 4 * 2 + 4  # one update's completions and the validation after the last


def test_table_is_long_enough_and_names_are_unique():
    names = [(case.step, case.name) for case in CASES]
    assert len(set(names)) == len(names) >= 40


@pytest.mark.parametrize("name", ["rank above the matrix", "malformed lines", "unknown key"])
def test_same_line_from_a_process_of_its_own(name, tmp_path):
    case = next(case for case in CASES if case.name == name)
    for file, data in case.files.items():
        (tmp_path / file).write_bytes(data)
    arguments = arguments_of(case, tmp_path, lambda: tmp_path)
    before = contents(tmp_path)
    command = [sys.executable, "-m", f"components.{case.step}", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert re.search(case.says, done.stderr)
    assert contents(tmp_path) == before


def test_disk_that_fills_up(tmp_path):
    """A file may grow to 8 KiB and no further, which the system reports as it reports a full disk."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); "
    limited += "import runpy; sys.argv = sys.argv[1:]; runpy.run_module('components.data_prep', run_name='__main__')"
    command = [sys.executable, "-c", limited, "data_prep", "--config", str(tiny_toml(tmp_path))]
    before = contents(tmp_path)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out")],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "free space or choose another output" in done.stderr
    assert contents(tmp_path) == before


def test_full_disk(tmp_path):
    """A file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("the right to mount a small tmpfs is missing")
    try:
        command = [sys.executable, "-m", "components.data_prep", "--config", str(tiny_toml(tmp_path))]
        done = subprocess.run(
            [*command, "--output", str(disk / "out")], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1
        assert "No space left on device" in done.stderr
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
