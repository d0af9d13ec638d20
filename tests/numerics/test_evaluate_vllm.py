"""The evaluation by vLLM gives the answers of the built-in engine; a warm-up of no updates reads no weights."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from components.runner import execute
from components.sft_warmup.step import STEP as SFT_WARMUP
from tests.numerics.test_vllm_engine import BASE, adapter_of
from tests.tiny_run import tiny_config
from tests.vllm_here import needs_vllm
from tuneloop.data.schema import Example
from tuneloop.errors import UserError
from tuneloop.evaluation.contenders import Contender, answer_all
from tuneloop.evaluation.harness import AnswerSettings
from tuneloop.models.adapter_io import load_adapter
from tuneloop.models.sources import resolve_model
from tuneloop.rewards.base import build_scorer
from tuneloop.rollout.settings import EngineSettings
from tuneloop.settings import SamplingSettings


@needs_vllm
def test_vllm_answers_as_the_built_in_engine(tmp_path):
    base = resolve_model(BASE)
    config = tiny_config()
    contenders = [Contender("base", base), Contender("candidate", base, adapter_of(base, rank=4, seed=1))]
    examples = [
        Example(f"{number:032x}", [{"role": "user", "content": f"{number} + 4 ="}], str(number + 4), "", "", "", {})
        for number in range(6)
    ]
    asked = AnswerSettings(1, SamplingSettings(temperature=0.7), max_new_tokens=8, seed=3)
    vllm = EngineSettings(kind="vllm", max_sequences=16, kv_cache_bytes=50_000_000)
    by_vllm = replace(asked, engine=vllm, max_length=160, log=tmp_path / "engine.log")
    scorer = build_scorer(config.task.rewards)
    expected, found = (answer_all(contenders, examples, scorer, how, "float32") for how in (asked, by_vllm))
    for name in ("base", "candidate"):
        assert [a.completion for a in found[name].greedy] == [a.completion for a in expected[name].greedy]
    assert expected["base"].greedy != expected["candidate"].greedy


def test_harness_needs_the_built_in_engine():
    with pytest.raises(UserError, match="harness needs the built-in engine"):
        tiny_config("evaluate.engine={kind='vllm'}", "evaluate.harness={tasks=['gsm8k']}")


def test_warm_up_without_updates_reads_no_weights(tmp_path, monkeypatch):
    """The adapter is that of a warm-up that reads them, though their file is gone when the step looks."""
    config = tiny_config("sft_warmup.updates=0")
    data = tmp_path / "data"
    from components.data_prep.step import STEP as DATA_PREP

    execute(DATA_PREP, config, {}, str(data))
    execute(SFT_WARMUP, config, {"data": str(data)}, str(tmp_path / "fresh"))
    record = json.loads((tmp_path / "fresh" / "warmup.json").read_text())
    assert record["validation_loss"] == {"first": None, "last": None}
    assert not (tmp_path / "fresh" / "metrics.jsonl").exists()

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("tuneloop.models.load.load_model", refuse)
    execute(SFT_WARMUP, config, {"data": str(data)}, str(tmp_path / "again"))
    again = json.loads((tmp_path / "again" / "warmup.json").read_text())
    assert again["adapter_digest"] == record["adapter_digest"]
    monkeypatch.undo()
    _same_as_attached(config, tmp_path / "fresh")


def _same_as_attached(config, folder: Path) -> None:
    from tuneloop.models.load import load_model
    from tuneloop.models.lora import attach

    layers = attach(load_model(resolve_model(config.model.uri), "float32", "cpu"), config.lora, config.seed)
    factors = load_adapter(folder / "adapter").factors
    assert set(factors) == set(layers)
    for name, (a, b) in factors.items():
        assert torch.equal(a, layers[name].A.data)
        assert torch.equal(b, layers[name].B.data)
