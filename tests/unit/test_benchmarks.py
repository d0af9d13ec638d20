"""What the benchmarks count and print, by hand on small numbers."""

import argparse
import json
import re

import pytest
import torch

from benchmarks import __main__ as bench
from benchmarks.common import RESULTS, MemoryWindow, Row, table, tensor_bytes
from benchmarks.gpu import decode_floor
from benchmarks.lora_vs_full import budget_rows, held_bytes
from benchmarks.packing import attention_pairs, count_packed, count_padded
from tuneloop.models.packed import pack


def test_packed_rows_are_all_real():
    # Prompt 3 with completions 4 and 2: rows 3 + (4 - 1) + (2 - 1) = 7; pairs 6 + (3*3 + 6) + (1*3 + 1) = 25.
    counted = count_packed([(3, [4, 2])], budget=100)
    assert (counted["real"], counted["rows"], counted["pairs"]) == (7, 7, 25)
    assert counted["pairs_computed"] >= counted["pairs"]


def test_padded_rows_by_hand():
    # Two prompts (3, 5), completions (4, 2) and (1, 1): all as wide as 5 + 4 = 9.
    counted = count_padded([(3, [4, 2]), (5, [1, 1])], size=2)
    assert counted == {"trl_real": 7 + 5 + 6 + 6, "trl_rows": 4 * 9, "trl_pairs": 4 * 81}


def test_attention_pairs_of_equal_lengths():
    # One prompt of 40, no completions: a square of 1600; an added column may count for under a hundredth.
    assert attention_pairs(pack([([1] * 40, [])])) == pytest.approx(1600, rel=0.01)


def test_a_budget_takes_the_best_setting_within_it():
    def one(mode: str, resident: int, rate: float) -> dict:
        return {"mode": mode, "resident_bytes": resident, "samples_per_second": rate}

    sweep = [one("lora", 60, 5.0), one("lora", 95, 9.0), one("lora", 160, 20.0), one("full", 100, 3.0)]
    rows = budget_rows(sweep)
    assert [row.ratio for row in rows] == pytest.approx([3.0, 3.0, 3.0])
    assert [row.ratio for row in budget_rows([*sweep, one("full", 120, 4.5)])] == pytest.approx([3.0, 2.0, 2.0])


def test_held_bytes_count_masters_moments_and_gradients_once():
    from tuneloop.settings import OptimizerSettings
    from tuneloop.training.optim import MasterAdamW

    model = torch.nn.Linear(8, 4, bias=False).to(torch.bfloat16)
    optimizer = MasterAdamW(list(model.named_parameters()), OptimizerSettings(learning_rate=0.1), 2)
    optimizer.backward(model(torch.ones(2, 8, dtype=torch.bfloat16)).sum())
    optimizer.step()
    policy = argparse.Namespace(model=model, layers={}, parameters=lambda: model.named_parameters())
    # 32 weights: master, gradient and two moments in fp32; adam's step count is 4 bytes more.
    held = held_bytes(argparse.Namespace(policy=policy, optimizer=optimizer, reference=None))
    assert held == 32 * 16 + 4


def test_decoding_floor_by_hand():
    # 3 steps, 2 prompts of 10 tokens, 4 sequences: 3 * 1000 of weights, 2*10*3 + 4*(3*4/2) = 84 tokens of 5 bytes.
    lora = {
        "decode": {"steps": 3}, "prompt_tokens": 10, "read_bytes": 1000, "cache_bytes_a_token": 5,
    }  # fmt: skip
    request = argparse.Namespace(prompts=2, group=2)
    assert decode_floor(lora, {"copy_bytes_per_second": 100.0}, request) == pytest.approx((3000 + 84 * 5) / 100)


def test_memory_window_sees_what_was_freed_again():
    with MemoryWindow() as window:
        torch.ones(50_000_000).add_(1)
    assert 190e6 < window.rise < 260e6


def test_tensor_bytes_count_a_storage_once():
    before = tensor_bytes()
    held = torch.zeros(1000)
    views = [held[:10], held[10:]]
    assert tensor_bytes() - before == 4000
    assert len(views) == 2


def test_table_is_aligned():
    lines = table([Row("a", "1", "2 x", 0.5, "1"), Row("longer", "10", "20 x", None, "")]).splitlines()
    assert len({line.index("x") for line in lines[1:]}) == 2
    assert lines[1].split() == ["a", "1", "2", "x", "0.5", "1"]
    assert lines[0].startswith("what    ours")


def test_a_benchmark_that_cannot_run_is_skipped_with_its_reason(capsys):
    skipped = bench.run(bench.Benchmark("merge", missing=lambda: "no room"), quick=False)
    assert (skipped.told, skipped.failed, skipped.rows) == ("skipped: no room", False, [])
    missing = bench.run(bench.Benchmark("nothing"), quick=False)
    assert missing.told == "skipped: benchmarks/nothing.py is missing"
    assert "no room" in bench.summary([skipped, missing])
    assert "==> merge: skipped, no room" in capsys.readouterr().out


def test_saved_tables_can_be_read_back(tmp_path, monkeypatch):
    from benchmarks import common

    monkeypatch.setattr(common, "REPOSITORY", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    rows = [Row("work", "1", "2", 0.5, "1")]
    path = common.save("unit_test", rows, {"more": 1})
    saved = json.loads(path.read_text())
    assert [Row(**row) for row in saved["table"]] == rows
    assert saved["more"] == 1


def test_results_name_no_place_of_the_machine_that_measured():
    files = sorted(RESULTS.glob("*.json"))
    assert files
    assert [file.name for file in files if re.search(r'"/\w+/', file.read_text())] == []
