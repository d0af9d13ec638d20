"""The step from its config, on real data where it lies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import reasoning_gym

from components.config import RunConfig
from components.data_prep.step import STEP
from components.runner import execute
from tests.tiny_run import tiny_config, tiny_toml
from tuneloop.config import parse_config
from tuneloop.data.reader import read_examples
from tuneloop.data.schema import SPLITS

REPOSITORY = Path(__file__).resolve().parents[2]
GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k" / "train.jsonl"


def config(*sources: dict, task: dict | None = None, **data_prep) -> RunConfig:
    data = {
        "name": "test",
        "model": {"uri": "tiny://qwen2?seed=0", "max_length": 4096},
        "task": {"max_new_tokens": 64, **(task or {})},
        "data_prep": {"sources": list(sources), "max_prompt_tokens": 2048, "max_completion_tokens": 2048, **data_prep},
    }
    return parse_config(RunConfig, data, "test")


def prepared(run_config: RunConfig, output: Path) -> tuple[dict, dict]:
    result = execute(STEP, run_config, {}, str(output))
    card = json.loads((output / "data_card.json").read_text())
    rows = card["rows"]
    assert rows["read"] == rows["kept"] + rows["quarantined"] + sum(rows["dropped"].values())
    summary = result.summary
    assert (summary["rows_kept"], summary["rows_quarantined"]) == (rows["kept"], rows["quarantined"])
    assert sum(int(summary[f"rows_{split}"] or 0) for split in SPLITS) == rows["kept"]
    return card, {split: read_examples(output / f"{split}.parquet") for split in SPLITS}


def test_gsm8k_every_row_is_accounted_for(tmp_path):
    if not GSM8K.exists():
        pytest.skip("needs ../shared/data/gsm8k/train.jsonl, beside the repository")
    system = "Reason step by step."
    card, splits = prepared(
        config({"kind": "gsm8k", "uri": str(GSM8K)}, task={"system_prompt": system}), tmp_path / "out"
    )
    assert card["rows"]["read"] == 7_473
    assert card["rows"]["quarantined"] == 0
    kept = {example.messages[1]["content"]: example for examples in splits.values() for example in examples}
    assert len(kept) == card["rows"]["kept"] > 7_460
    for line in GSM8K.read_text().splitlines():
        original = json.loads(line)
        example = kept.get(original["question"])
        if example is None:
            continue  # dropped, and counted above
        assert example.messages[0] == {"role": "system", "content": system}
        assert example.answer == original["answer"].split("####")[1].strip().replace(",", "")
        assert example.completion.endswith(f"\n#### {example.answer}")
        assert "<<" not in example.completion
    assert 0.08 < len(splits["test"]) / len(kept) < 0.12  # 0.1 with a standard deviation of 0.0035


def test_reasoning_gym_rows_score_their_own_answers(tmp_path):
    card, splits = prepared(tiny_config("task.rewards=[{kind='reasoning_gym'}]"), tmp_path / "out")
    assert card["sources"] == [
        {"source": "reasoning_gym:chain_sum", "read": 300, "kept": card["rows"]["kept"]},
    ]
    score = reasoning_gym.get_score_answer_fn("chain_sum")
    for example in splits["train"]:
        assert example.reward_kind == "reasoning_gym"
        assert score(example.answer, example.metadata) == 1.0


def test_rows_are_left_to_the_tasks_reward_when_it_is_another(tmp_path):
    _, splits = prepared(tiny_config(), tmp_path / "out")
    assert {example.reward_kind for example in splits["train"]} == {""}


def test_several_sources_with_columns_of_their_own(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"q": "item {n}", "a": {n}}}\n' for n in range(60)))
    (tmp_path / "b.jsonl").write_text("".join(f'{{"prompt": "thing {n}", "answer": "{n}"}}\n' for n in range(60)))
    first = {"kind": "jsonl", "uri": str(tmp_path / "a.jsonl"), "prompt_column": "q", "answer_column": "a"}
    second = {"kind": "jsonl", "uri": (tmp_path / "b.jsonl").as_uri(), "template": "Do {prompt}!", "size": 50}
    near = {"enabled": False}
    card, splits = prepared(config(first, second, near_duplicates=near), tmp_path / "out")
    assert [source["read"] for source in card["sources"]] == [60, 50]
    contents = {example.messages[0]["content"] for examples in splits.values() for example in examples}
    assert contents == {f"item {n}" for n in range(60)} | {f"Do thing {n}!" for n in range(50)}


def test_the_step_needs_neither_kfp_nor_torch_once_the_model_is_there(tmp_path):
    execute(STEP, tiny_config(), {}, str(tmp_path / "first"))  # makes the tiny model
    code = (
        "import sys; sys.modules['torch'] = sys.modules['kfp'] = None; from components.data_prep.step import STEP; "
        "from components.step_command import main; "
        f"sys.exit(main(STEP, ['--config', {str(tiny_toml(tmp_path))!r}, '--output', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "data_prep: kept " in done.stdout
    first, second = (json.loads((tmp_path / name / "data_card.json").read_text()) for name in ("first", "out"))
    assert first == second
