"""The evaluate step on a tiny model that has really learnt its task: to answer 7, whatever is asked."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from components.config import RunConfig, load_run_config
from components.data_prep.step import STEP as DATA_PREP
from components.evaluate.step import STEP
from components.runner import execute, step_fingerprint
from components.sft_warmup.step import STEP as SFT_WARMUP
from components.step_command import main
from tuneloop.data.reader import read_examples
from tuneloop.errors import UserError
from tuneloop.models.adapter_io import Adapter, load_adapter, save_adapter
from tuneloop.models.sources import resolve_model
from tuneloop.registry import Registry

BASE, OTHER_BASE = "tiny://qwen2?seed=0", "tiny://qwen2?seed=1"
TOML = """
name = "seven"
seed = 5
[model]
uri = "tiny://qwen2?seed=0"
dtype = "float32"
max_length = 96
[task]
max_new_tokens = 4
[[task.rewards]]
kind = "exact"
[[task.rewards]]
kind = "format"
pattern = ".?"
weight = 0.5
[lora]
rank = 4
[data_prep]
max_prompt_tokens = 80
max_completion_tokens = 8
near_duplicates.enabled = false
test_share = 0.4
[[data_prep.sources]]
kind = "jsonl"
uri = "ROWS"
[sft_warmup]
updates = 0
examples_per_update = 16
optimizer.learning_rate = 0.02
[evaluate]
prompts = 40
min_prompts = 40
samples = 2
pass_k = [2]
"""


@dataclass(frozen=True)
class Run:
    """The outputs that evaluation reads."""

    folder: Path
    config: RunConfig

    def inputs(self, **others: Path) -> dict[str, str]:
        """The step's inputs, some replaced."""
        names = {"data": self.folder / "data", "warmup": self.folder / "warmup", "training": self.folder / "training"}
        return {name: str(path) for name, path in (names | others).items()}

    def configured(self, *overrides: str) -> RunConfig:
        """The config with overrides."""
        return load_run_config(self.folder / "run.toml", overrides)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small are slower on several
    folder = tmp_path_factory.mktemp("run")
    rows = [json.dumps({"prompt": f"Say seven, for the {i}th time.", "answer": "7"}) for i in range(150)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    (folder / "run.toml").write_text(TOML.replace("ROWS", str(folder / "rows.jsonl")))
    config = load_run_config(folder / "run.toml")
    execute(DATA_PREP, config, {}, str(folder / "data"))
    data = {"data": str(folder / "data")}
    execute(SFT_WARMUP, config, data, str(folder / "warmup"))
    # Enough supervised updates stand in for RL: what matters here is an adapter that has learnt the task.
    learnt = load_run_config(folder / "run.toml", ("sft_warmup.updates=20",))
    execute(SFT_WARMUP, learnt, data, str(folder / "learnt"))
    lay_out_training(folder / "learnt" / "adapter", folder / "training")
    yield Run(folder, config)
    torch.set_num_threads(threads)


def lay_out_training(adapter: Path, training: Path) -> Path:
    """What lora_rl leaves behind, for this adapter."""
    shutil.copytree(adapter, training / "adapter")
    (training / "rl.json").write_text(json.dumps({"adapter_digest": load_adapter(adapter).digest()}))
    return training


def random_adapter(run: Run, seed: int) -> Adapter:
    """An adapter that changes what the base says, to no good."""
    fresh = load_adapter(run.folder / "warmup" / "adapter")
    generator = torch.Generator().manual_seed(seed)
    factors = {name: (a, torch.randn(b.shape, generator=generator)) for name, (a, b) in fresh.factors.items()}
    return Adapter(factors, fresh.config)


def promoted(run: Run, registry: Path, adapter: Path, base_uri: str) -> str:
    """Make the adapter the incumbent of a new registry; returns the override that names the registry."""
    record = {"adapter_digest": load_adapter(adapter).digest(), "base_uri": base_uri}
    version = Registry(str(registry)).register("adapter", adapter, record).version
    Registry(str(registry)).promote("adapter", version, "production", None)
    return f"promote.registry={registry}"


def evaluated(run: Run, output: Path, *overrides: str, **inputs: Path) -> dict:
    """Run the step; returns evaluation.json."""
    overrides = (f"promote.registry={output.parent / 'empty'}", *overrides)
    execute(STEP, run.configured(*overrides), run.inputs(**inputs), str(output))
    return json.loads((output / "evaluation.json").read_text())


def rows_of(output: Path, model: str) -> list[dict]:
    rows = pq.read_table(output / "answers.parquet").to_pylist()
    return [{key: value for key, value in row.items() if key != "model"} for row in rows if row["model"] == model]


def test_a_candidate_that_learnt_its_task_passes_the_gate(run: Run, tmp_path: Path, capsys):
    evaluation = evaluated(run, tmp_path / "evaluate")
    assert (evaluation["prompts"], evaluation["samples"], evaluation["seed"]) == (40, 2, 5)
    assert evaluation["incumbent"] is None
    assert list(evaluation["models"]) == ["base", "sft", "candidate"]
    assert evaluation["models"]["base"]["accuracy"]["value"] == 0.0
    candidate = evaluation["models"]["candidate"]
    assert candidate["accuracy"]["value"] > 0.9
    assert set(candidate["pass_at"]) == {"1", "2"}
    assert candidate["pass_at"]["2"]["value"] >= candidate["pass_at"]["1"]["value"] > 0.5
    assert set(candidate["metrics"]) == {"completion_tokens", "truncated_share", "exact", "format"}
    assert candidate["metrics"]["truncated_share"] < 0.1 < evaluation["models"]["base"]["metrics"]["truncated_share"]
    pairs = [(one["reference"], one["metric"]) for one in evaluation["comparisons"]]
    assert pairs == [(name, metric) for name in ("base", "sft") for metric in ("accuracy", "pass_at_1")]
    gate = evaluation["gate"]
    assert gate["passed"], gate
    assert gate["reason"].endswith("there is no incumbent yet")
    assert "evaluate sft: computes the same as base" in capsys.readouterr().out  # a fresh adapter changes nothing


def test_the_answers_are_the_figures(run: Run, tmp_path: Path):
    evaluation = evaluated(run, tmp_path / "evaluate")
    rows = rows_of(tmp_path / "evaluate", "candidate")
    assert len(rows) == 40 * (1 + 2)
    asked = sorted(example.id for example in read_examples(run.folder / "data" / "test.parquet"))[:40]
    greedy = [row for row in rows if row["sample"] == -1]
    assert [row["prompt_id"] for row in greedy] == asked
    assert sum(row["correct"] for row in greedy) / 40 == evaluation["models"]["candidate"]["accuracy"]["value"]
    sampled = [row for row in rows if row["sample"] >= 0]
    assert sum(row["correct"] for row in sampled) / 80 == pytest.approx(
        evaluation["models"]["candidate"]["pass_at"]["1"]["value"]
    )
    for row in rows:
        assert row["correct"] == (row["completion"].strip() == "7")
        assert row["reward"] == 1.0 * row["correct"] + 0.5 * (len(row["completion"]) <= 1)
        assert 1 <= row["tokens"] <= 4
    right = next(row for row in greedy if row["correct"])
    assert (right["tokens"], right["truncated"]) == (2, False)  # "7" and the end of the turn


def test_neither_a_second_run_nor_another_batch_size_changes_an_answer(run: Run, tmp_path: Path):
    first = evaluated(run, tmp_path / "first")
    assert evaluated(run, tmp_path / "again") == first
    assert rows_of(tmp_path / "again", "candidate") == rows_of(tmp_path / "first", "candidate")
    evaluated(run, tmp_path / "small", "evaluate.max_sequences=7")
    assert rows_of(tmp_path / "small", "candidate") == rows_of(tmp_path / "first", "candidate")


def test_a_weaker_incumbent_is_beaten(run: Run, tmp_path: Path):
    save_adapter(random_adapter(run, 1), tmp_path / "weak")
    registry = promoted(run, tmp_path / "registry", tmp_path / "weak", BASE)
    evaluation = evaluated(run, tmp_path / "evaluate", registry)
    assert evaluation["incumbent"] == {"version": 1, "adapter_digest": load_adapter(tmp_path / "weak").digest()}
    assert evaluation["gate"]["passed"]
    assert "incumbent 0.0 %" in evaluation["gate"]["reason"]
    assert rows_of(tmp_path / "evaluate", "incumbent") != rows_of(tmp_path / "evaluate", "base")


def test_a_candidate_as_good_as_the_incumbent_is_refused_and_the_exit_code_is_0(run: Run, tmp_path: Path):
    learnt = load_adapter(run.folder / "training" / "adapter")
    # The same function in other numbers: 2 A and B / 2 compute what A and B do.
    same = Adapter({name: (2 * a, b / 2) for name, (a, b) in learnt.factors.items()}, learnt.config)
    save_adapter(same, tmp_path / "same")
    registry = promoted(run, tmp_path / "registry", tmp_path / "same", BASE)
    arguments = [f"--{name}={path}" for name, path in run.inputs().items()]
    config = ["--config", str(run.folder / "run.toml"), "--set", registry, "--output", str(tmp_path / "evaluate")]
    assert main(STEP, [*config, *arguments]) == 0
    gate = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())["gate"]
    assert not gate["passed"]
    assert "is not proven better than incumbent" in gate["reason"]
    assert gate["p_value"] == 1.0


def test_the_incumbent_itself_is_refused_by_its_digest(run: Run, tmp_path: Path, capsys):
    registry = promoted(run, tmp_path / "registry", run.folder / "training" / "adapter", BASE)
    gate = evaluated(run, tmp_path / "evaluate", registry)["gate"]
    assert not gate["passed"]
    assert gate["reason"].startswith("the candidate is the incumbent: same adapter digest")
    assert "evaluate incumbent: computes the same as candidate" in capsys.readouterr().out


def test_an_incumbent_over_another_base_is_evaluated_over_that_base(run: Run, tmp_path: Path):
    save_adapter(random_adapter(run, 1), tmp_path / "weak")
    registry = promoted(run, tmp_path / "registry", tmp_path / "weak", OTHER_BASE)
    evaluated(run, tmp_path / "evaluate", registry)
    over_ours = promoted(run, tmp_path / "registry2", tmp_path / "weak", BASE)
    evaluated(run, tmp_path / "evaluate2", over_ours)
    assert rows_of(tmp_path / "evaluate", "incumbent") != rows_of(tmp_path / "evaluate2", "incumbent")
    assert rows_of(tmp_path / "evaluate", "candidate") == rows_of(tmp_path / "evaluate2", "candidate")


def test_an_incumbent_whose_base_is_gone_is_the_users_business(run: Run, tmp_path: Path):
    gone = str(tmp_path / "deleted-model")
    registry = promoted(run, tmp_path / "registry", run.folder / "training" / "adapter", gone)
    with pytest.raises(
        UserError, match=r"the incumbent \(adapter version 1\) stands on .*deleted-model.*cannot be loaded"
    ):
        evaluated(run, tmp_path / "evaluate", registry)
    assert not (tmp_path / "evaluate").exists()


def test_after_a_full_fine_tuning_warm_up_and_candidate_stand_on_the_warmed_up_model(run: Run, tmp_path: Path):
    shutil.copytree(run.folder / "warmup", tmp_path / "warmup")
    shutil.copytree(resolve_model(OTHER_BASE), tmp_path / "warmup" / "model")
    evaluated(run, tmp_path / "full", warmup=tmp_path / "warmup")
    evaluated(run, tmp_path / "plain", f"model.uri={OTHER_BASE}")
    assert rows_of(tmp_path / "full", "sft") == rows_of(tmp_path / "plain", "base")
    assert rows_of(tmp_path / "full", "candidate") == rows_of(tmp_path / "plain", "candidate")
    assert rows_of(tmp_path / "full", "base") != rows_of(tmp_path / "plain", "base")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluate={prompts=500, min_prompts=400}", r"held-out prompts, fewer than evaluate.min_prompts = 400"),
        ('evaluate.gate.guards=[{metric="exakt"}]', r"'exakt' is not measured; known: .*exact"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_a_model_is_loaded(run: Run, tmp_path: Path, override, message):
    with pytest.raises(UserError, match=message):
        evaluated(run, tmp_path / "evaluate", override)
    assert not list(tmp_path.glob("evaluate*"))


def test_an_adapter_that_rl_json_does_not_name_is_refused(run: Run, tmp_path: Path):
    training = lay_out_training(run.folder / "training" / "adapter", tmp_path / "training")
    save_adapter(random_adapter(run, 2), training / "adapter")
    with pytest.raises(UserError, match=r"is not the adapter that rl.json names"):
        evaluated(run, tmp_path / "evaluate", training=training)


def test_more_samples_must_be_drawn_than_pass_k_asks_for(run: Run):
    with pytest.raises(UserError, match="pass_k holds 3, but only samples = 2 are drawn"):
        run.configured("evaluate.pass_k=[1, 3]")


def test_which_incumbent_is_asked_for_decides_the_result(run: Run):
    paths = {name: Path(path) for name, path in run.inputs().items()}
    fingerprints = {
        step_fingerprint(STEP, run.configured(*overrides), paths)
        for overrides in ((), ("promote.alias=staging",), ("evaluate.gate.margin=0.1",), ("name=other",))
    }
    assert len(fingerprints) == 3  # the run's name decides nothing
