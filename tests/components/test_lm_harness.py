"""lm-evaluation-harness on tasks of our own that lie on the disk, with the tiny model."""

import json
import math
from pathlib import Path

import pytest

from components.check.step import STEP as CHECK
from components.evaluate.step import STEP as EVALUATE
from components.lora_rl.step import STEP as LORA_RL
from components.runner import execute
from components.sft_warmup.step import STEP as SFT_WARMUP
from tests.prepared_data import write_prepared
from tests.tiny_run import tiny_config
from tuneloop.errors import UserError
from tuneloop.evaluation.contenders import Contender
from tuneloop.evaluation.harness_model import EngineLM, cut_at
from tuneloop.evaluation.lm_harness import Harness, guard_metrics, read_scores, task_manager
from tuneloop.evaluation.settings import HarnessSettings
from tuneloop.models.load import load_tokenizer
from tuneloop.models.sources import resolve_model
from tuneloop.report import build_report
from tuneloop.rollout.torch_engine import TorchEngine

BASE = "tiny://qwen2?seed=0"
CHOICES = """
task: digits_choice
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
metadata:
  version: 1.0
"""
COMPLETION = """
task: digits_say
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}} is"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs:
  until: ["\\n", "a"]
  max_gen_toks: 40
metric_list:
  - metric: exact_match
metadata:
  version: 1.0
"""
PERPLEXITY = """
task: digits_text
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: byte_perplexity
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """A folder with three tasks over the same seven documents."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "digits.jsonl"
    rows = [
        {"question": f"the digit after {n}", "choices": [" one", " two", f" {n + 1}"], "label": n % 3} for n in range(7)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICES), ("say", COMPLETION), ("text", PERPLEXITY)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return TorchEngine(resolve_model(BASE), dtype="float32")


@pytest.fixture(scope="module")
def ours(engine) -> EngineLM:
    tokenizer = load_tokenizer(resolve_model(BASE))
    return EngineLM(engine, tokenizer, max_length=48, batch_tokens=64, seed=1, label="test")


@pytest.fixture(scope="module")
def theirs():
    """lm-eval's own model over transformers' forward pass."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(resolve_model(BASE)), dtype="float32", device="cpu", batch_size=2, max_length=48)


def requests(kind: str, *arguments: tuple):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


PAIRS = [
    ("What is 1 + 1?", " 2"),
    ("What is 1 + 1?", " three or four"),
    ("", "nothing before"),
    ("ends with a space ", "so the space moves"),
    ("longer than the model is allowed to see, so that the beginning has to go", " away"),
]


def test_loglikelihoods_equal_lm_evals_own(ours, theirs):
    expected = theirs.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", *PAIRS))
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_continuation_longer_than_the_model_sees_is_cut(ours):
    digits = "0123456789" * 6
    long, cut = ours.loglikelihood(requests("loglikelihood", ("short", digits), (digits[-49], digits[-48:])))
    assert long[0] == pytest.approx(cut[0], abs=1e-3)


def test_what_the_model_would_say_counts_as_greedy(ours, theirs):
    said = theirs.generate_until(requests("generate_until", ("What?", {"until": [], "max_gen_toks": 6})), True)[0]
    pairs = [("What?", said[:2]), ("What?", said[:2] + "~")]  # further ones are parts of characters
    expected = [greedy for _, greedy in theirs.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)]
    assert [greedy for _, greedy in ours.loglikelihood(requests("loglikelihood", *pairs))] == expected == [True, False]


def test_rolling_loglikelihoods_equal_lm_evals_own(ours, theirs):
    texts = [("short",), ("a text of several windows, because the model sees forty-eight bytes at a time " * 2,)]
    mine = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert mine == pytest.approx(expected, abs=1e-3)


def test_completions_equal_lm_evals_own(ours, theirs):
    asked = [
        ("one", {"until": ["\n"], "max_gen_toks": 40}),  # two pieces
        ("two", {"until": ["\n"], "max_gen_toks": 40}),
        ("three", {"until": "e", "max_gen_toks": 7}),
        ("a prompt longer than the model is allowed to see together with its answer", {"until": [], "max_gen_toks": 9}),
    ]
    mine = ours.generate_until(requests("generate_until", *asked))
    assert mine == theirs.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    first = theirs.generate_until(requests("generate_until", ("one", {"until": [], "max_gen_toks": 40})), True)[0]
    stop = first[20]
    cut = ours.generate_until(requests("generate_until", ("one", {"until": [stop], "max_gen_toks": 40})))[0]
    assert cut == cut_at(first, [stop])
    assert len(cut) < len(first)


def test_sampled_completions_depend_on_the_seed_alone(ours):
    asked = requests(
        "generate_until", ("one", {"until": [], "max_gen_toks": 40, "do_sample": True, "temperature": 1.0})
    )
    assert ours.generate_until(asked) == ours.generate_until(asked)
    assert ours.generate_until(asked) != ours.generate_until(
        requests("generate_until", ("one", {"until": [], "max_gen_toks": 40}))
    )


def test_tasks_on_a_model(tasks, engine):
    settings = HarnessSettings(
        tasks=("digits_choice", "digits_say", "digits_text"), include_path=str(tasks), limit=5, num_fewshot=1
    )
    contender = Contender("base", resolve_model(BASE))
    harness = Harness(settings, 3, [contender])
    engine.sync(None)
    harness.visit(contender, engine, load_tokenizer(resolve_model(BASE)))
    scores = harness.scores()["base"]
    choice = scores["digits_choice"]["acc"]
    assert choice.value in [k / 5 for k in range(6)]
    assert choice.stderr == pytest.approx(math.sqrt(choice.value * (1 - choice.value) / 4))
    assert choice.n == 5
    assert choice.higher_is_better
    assert scores["digits_text"]["byte_perplexity"].higher_is_better is False
    assert set(guard_metrics(scores)) == {"digits_choice/acc", "digits_say/exact_match"}


def test_a_filters_metric_keeps_the_filters_name():
    results = {
        "results": {
            "t": {"alias": "t", "em,strict": 0.5, "em_stderr,strict": "N/A", "em,none": 1, "em_stderr,none": 0.1}
        },
        "n-samples": {"t": {"original": 9, "effective": 4}},
        "higher_is_better": {"t": {"em": True}},
    }  # fmt: skip
    scores = read_scores(results)["t"]
    assert (scores["em,strict"].value, scores["em,strict"].stderr) == (0.5, None)
    assert (scores["em"].value, scores["em"].stderr, scores["em"].n) == (1.0, 0.1, 4)
    assert guard_metrics({"t": scores}) == {"t/em,strict": 0.5, "t/em": 1.0}


def test_check_knows_task_names(tasks, tmp_path):
    harness = f"evaluate.harness={{tasks=['digits_choise'], include_path='{tasks}'}}"
    with pytest.raises(UserError, match="lm-eval has no task 'digits_choise'; did you mean digits_choice"):
        execute(CHECK, tiny_config(harness), {}, str(tmp_path / "check"))
    with pytest.raises(UserError, match="include_path /nowhere: no such folder"):
        task_manager(HarnessSettings(tasks=("gsm8k",), include_path="/nowhere"))


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)  # importing it fails, as without the package
    with pytest.raises(UserError, match=r"pip install 'tuneloop\[harness\]'"):
        task_manager(HarnessSettings(tasks=("gsm8k",)))


def test_data_that_cannot_be_had(tasks, tmp_path):
    (tmp_path / "lost.yaml").write_text(CHOICES.format(data=tmp_path / "lost.jsonl").replace("digits_choice", "lost"))
    settings = HarnessSettings(tasks=("lost",), include_path=str(tmp_path))
    with pytest.raises(UserError, match="a task or its data cannot be loaded"):
        Harness(settings, 0, [])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, str]:
    """Outputs of data preparation, warm-up and RL."""
    run = tmp_path_factory.mktemp("trained")
    data = str(write_prepared(run / "data_prep"))
    execute(SFT_WARMUP, tiny_config(), {"data": data}, str(run / "sft_warmup"))
    inputs = {"data": data, "warmup": str(run / "sft_warmup")}
    execute(LORA_RL, tiny_config(), inputs, str(run / "lora_rl"))
    return {**inputs, "training": str(run / "lora_rl")}


def evaluate(trained, tmp_path, tasks, *overrides: str) -> dict:
    harness = f"evaluate.harness={{tasks=['digits_choice', 'digits_text'], include_path='{tasks}'}}"
    config = tiny_config(harness, f"promote.registry='{tmp_path}/registry'", *overrides)
    execute(EVALUATE, config, trained, str(tmp_path / "evaluate"))
    return json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())


def test_evaluation_holds_the_tasks_and_the_gate_guards_them(trained, tmp_path, tasks, capsys):
    evaluation = evaluate(trained, tmp_path, tasks, "evaluate.gate.guards=[{metric='digits_choice/acc', max_drop=0.5}]")
    harness = evaluation["harness"]
    assert set(harness["models"]) == {"base", "candidate"}
    assert harness["models"]["candidate"]["digits_choice"]["acc"]["n"] == 7
    base, candidate = (harness["models"][name]["digits_text"]["byte_perplexity"] for name in ("base", "candidate"))
    assert base["value"] != candidate["value"]  # two warm-up updates have moved it
    guard = next(check for check in evaluation["gate"]["checks"] if check["name"] == "guard digits_choice/acc")
    assert "against the base's" in guard["detail"]
    assert "digits_choice acc: base" in capsys.readouterr().out
    html = build_report(tmp_path).html.read_text()
    assert "digits_text" in html
    assert "byte_perplexity ↓" in html


def test_a_guard_on_what_no_task_measures(trained, tmp_path, tasks):
    with pytest.raises(UserError, match="byte_perplexity' is not measured by its task, or better when lower"):
        evaluate(trained, tmp_path, tasks, "evaluate.gate.guards=[{metric='digits_text/byte_perplexity'}]")
    assert not (tmp_path / "evaluate").exists()
