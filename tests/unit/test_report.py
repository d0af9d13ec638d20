"""The report of whole, stopped, failed and damaged runs, read back from the files that it writes."""

import json
import math
import re
from html import unescape

import pytest
import yaml

from tests.report_run import ATTACK, STEPS, fail_in, make_run, stop_after
from tuneloop.config import config_digest
from tuneloop.errors import UserError
from tuneloop.report import build_report, report_metrics
from tuneloop.report.html import text
from tuneloop.report.page import MAX_BYTES


def built(folder, error=""):
    """The page's visible text and source, the card, and report.json of a run folder."""
    files = build_report(folder, error)
    source = files.html.read_text()
    body = re.sub(r"<(script|style)\b.*?</\1>", "", source, flags=re.S)
    visible = " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())
    return visible, source, files.model_card.read_text(), json.loads(files.summary.read_text())


def charts_of(source):
    """The data behind the page's curves."""
    return json.loads(re.search(r'id="charts">(.*?)</script>', source, re.S)[1])


def test_promoted_run_says_what_was_proven(tmp_path):
    visible, _, _, summary = built(make_run(tmp_path / "friday"))
    assert "The candidate is better, and is now version 4" in visible
    # 447 of 512 against 324 of 512: 0.87305 - 0.63281 = 0.24023
    assert "+24.0 points against the incumbent" in visible
    assert "+19.7 to +28.3" in visible
    assert "3.1 × 10⁻²⁴" in visible
    assert "Candidate 87.3% accuracy beats what is there" in visible
    assert "✓ passed: beats incumbent candidate 87.3 % beats incumbent (+24.0 points, p = 3.1e-24)" in visible
    assert summary["status"] == "promoted"
    assert summary["error"] is None


def test_report_json_has_the_documented_content(tmp_path):
    run = make_run(tmp_path / "friday")
    summary = built(run)[3]
    config = json.loads((run / "config.json").read_text())
    assert set(summary) == {"run", "status", "error", "accuracy", "gate", "seconds", "peak_rss_bytes", "adapter_digest",
                            "config_digest"}  # fmt: skip
    assert summary["run"] == "friday"
    assert summary["accuracy"]["candidate"]["value"] == 447 / 512
    assert summary["accuracy"]["candidate"]["n"] == 512
    low, high = summary["accuracy"]["base"]["ci95"]
    assert low < 6 / 512 < high
    assert summary["gate"] == {
        "passed": True, "p_value": 3.1e-24, "reason": "candidate 87.3% accuracy beats what is there",
    }  # fmt: skip
    assert summary["seconds"]["lora_rl"] == 611.3
    assert list(summary["peak_rss_bytes"]) == list(STEPS)
    assert summary["adapter_digest"] == "c" * 64
    from components.config import RunConfig

    assert summary["config_digest"] == config_digest(RunConfig.model_validate_json(json.dumps(config)))


def test_refused_candidate_is_kept_out_and_not_called_a_failure(tmp_path):
    run = stop_after(make_run(tmp_path / "run", promoted=False), STEPS.index("promote"))
    visible, _, card, summary = built(run)
    assert summary["status"] == "kept"
    assert summary["error"] is None
    assert "The candidate was not promoted" in visible
    assert "Kept the incumbent" in visible
    assert "kept out by the gate" in visible
    assert "✗ failed: beats incumbent" in visible
    assert "The gate refused: candidate 64.6 % is not proven better than incumbent" in card


def test_first_run_without_incumbent_compares_with_the_base(tmp_path):
    visible, _, _, summary = built(make_run(tmp_path / "run", incumbent=False))
    assert "+86.1 points against the base" in visible
    assert summary["accuracy"]["incumbent"] is None
    assert "Parent none" in visible


@pytest.mark.parametrize("reached", range(len(STEPS)))
def test_every_beginning_of_a_run_has_a_report(tmp_path, reached):
    run = stop_after(make_run(tmp_path / "run"), reached)
    visible, _, card, summary = built(run)
    assert summary["status"] == "failed"
    assert summary["error"].startswith(f"{STEPS[reached]} was not run")
    assert f"The run stopped before {STEPS[reached]}" in visible
    done = [summary["seconds"][step] is not None for step in STEPS]
    assert done == [True] * reached + [False] * (len(STEPS) - reached)
    assert ("Rows read" in visible) == (reached > STEPS.index("data_prep"))
    assert ("Nats a token of the imitated completions" in visible) == (reached > STEPS.index("sft_warmup"))
    assert ("Completions over training" in visible) == (reached > STEPS.index("lora_rl"))
    assert ("Answers that changed" in visible) == (reached > STEPS.index("evaluate"))
    assert card.startswith("---\n")


def test_empty_folder_has_a_report(tmp_path):
    (tmp_path / "run").mkdir()
    visible, _, _, summary = built(tmp_path / "run")
    assert "The run stopped before check" in visible
    assert summary["config_digest"] is None
    assert summary["gate"] is None


def test_failed_step_is_named_with_its_line_and_its_unfinished_curves(tmp_path):
    run = fail_in(make_run(tmp_path / "run"), "lora_rl", "out of memory: lower\nmicro_batch_tokens", 2, lines=23)
    visible, source, card, summary = built(run)
    assert summary["error"] == "out of memory: lower micro_batch_tokens"
    assert "The run failed in lora_rl" in visible
    assert "out of memory: lower micro_batch_tokens" in visible
    assert "It had completed update 23 of 40." in visible
    assert "Something in the request must change" in visible
    assert "The run did not finish: out of memory: lower micro\\_batch\\_tokens" in card
    reward = next(chart for chart in charts_of(source) if chart["title"] == "Reward")
    assert reward["x"] == [1, 40]
    assert reward["lines"][0]["x"][-1] == 23


def test_preempted_step_was_stopped_and_did_not_fail(tmp_path):
    run = fail_in(make_run(tmp_path / "run"), "sft_warmup", "stopped by SIGTERM", 75, lines=9)
    visible = built(run)[0]
    assert "The run stopped in sft_warmup" in visible
    assert "the same command continues where it can" in visible


def test_failure_of_an_earlier_attempt_is_forgotten_once_the_step_is_done(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "lora_rl.failed.json").write_text('{"step": "lora_rl", "exit_code": 1, "message": "old"}')
    assert built(run)[3]["status"] == "promoted"


def test_callers_error_is_told_when_the_folder_knows_none(tmp_path):
    run = stop_after(make_run(tmp_path / "run"), 3)
    visible, _, _, summary = built(run, "the node\nwent away")
    assert summary["error"] == "the node went away"
    assert "The run stopped before lora_rl" in visible


def test_texts_are_escaped_everywhere(tmp_path):
    run = make_run(tmp_path / "run")
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    evaluation["gate"]["reason"] = ATTACK
    evaluation["gate"]["checks"][0]["detail"] = ATTACK
    (run / "evaluate" / "evaluation.json").write_text(json.dumps(evaluation))
    with (run / "lora_rl" / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"update": 41, ATTACK: 1.0}) + "\n")
    _, source, card, _ = built(run, error=ATTACK)
    assert str(text(ATTACK)) in source
    assert "<img" not in source
    assert source.count("<script") == 2  # the data and the page's own
    assert source.count("</script>") == 2
    assert "<img" not in card
    assert "<script" not in card


def test_unprintable_text_does_not_break_the_page(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "lora_rl" / "samples.jsonl").open("a") as samples:
        samples.write('{"update": 40, "prompt_id": "x", "prompt": "\\u0000\\ud800", "completion": "\\u001b[31m"}\n')
    visible = built(run)[0]
    assert "␀?" in visible
    assert "␛[31m" in visible


def test_page_needs_nothing_from_outside(tmp_path):
    _, source, _, _ = built(make_run(tmp_path / "run"))
    assert "://" not in source.replace("bundled://smollm2-135m-instruct", "")
    assert "url(" not in source
    assert "localStorage" not in source
    assert re.findall(r'<link[^>]+href="([^"]+)"', source) == ["data:,"]


def test_long_run_with_long_texts_stays_small(tmp_path):
    run = make_run(tmp_path / "run", updates=5000)
    with (run / "lora_rl" / "metrics.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    for row in rows:
        broken = row["update"] % 2 == 0
        row |= {f"more/{name}": float("nan") if broken else row["reward/mean"] / (name + 1) for name in range(60)}
        row |= {f"reward/part_{i}/mean": row["reward/mean"] * i for i in range(8)}
        row |= {"validation/accuracy": row["reward/mean"], "validation/reward": row["reward/mean"]}
    for step in ("sft_warmup", "lora_rl"):
        (run / step / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = json.loads((run / "config.json").read_text())
    config["lora"]["rank_pattern"] = {f"layers.{i}.{'q_proj' * 20}": 8 for i in range(20_000)}
    (run / "config.json").write_text(json.dumps(config))
    samples = [
        {"update": update, "prompt_id": f"{prompt}", "prompt": "'" * 5_000, "answer": "a", "completion": "'" * 5_000,
         "reward": 0.5, "rewards": {}}
        for update in range(0, 5000, 250) for prompt in range(12)
    ]  # fmt: skip
    (run / "lora_rl" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    visible, source, _, _ = built(run)
    assert len(source.encode()) <= MAX_BYTES
    assert "more characters)" in visible
    assert "Not drawn: " in visible
    points = max(len(line["x"]) for chart in charts_of(source) for line in chart["lines"])
    assert 100 < points <= 200  # with the first budget's 600 it would be too large


def test_values_that_are_not_finite_are_told_and_not_drawn(tmp_path):
    run = make_run(tmp_path / "run")
    metrics = run / "lora_rl" / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[11]["gradient/norm"] = rows[12]["gradient/norm"] = float("nan")
    for row in rows:
        row["entropy"] = float("inf")
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    visible, source, _, _ = built(run)
    assert "2 values are not a finite number, first at update 12" in visible
    assert "entropy: no value is a finite number" in visible
    assert "NaN" not in source
    assert all(
        math.isfinite(value or 0) for chart in charts_of(source) for line in chart["lines"] for value in line["y"]
    )


def test_damaged_file_is_named_and_the_rest_is_shown(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "evaluate" / "evaluation.json").write_text('{"models": ')
    visible = built(run)[0]
    assert "Could not be read evaluate/evaluation.json" in visible
    assert "Validation accuracy" in visible


def test_intervals_are_named_by_their_confidence(tmp_path):
    run = make_run(tmp_path / "run")
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    (run / "evaluate" / "evaluation.json").write_text(json.dumps(evaluation | {"confidence": 0.995}))
    visible, source, card, _ = built(run)
    assert "99.5% interval +19.7 to +28.3" in visible
    assert "95% interval" not in source.replace("99.5% interval", "")
    assert "| model | accuracy | 99.5% interval |" in card


def test_digests_that_disagree_are_shown(tmp_path):
    run = make_run(tmp_path / "run")
    assert "✓ The merged adapter is the trained one" in built(run)[0]
    (run / "merge_adapter" / "merge.json").write_text(json.dumps({"adapter_digest": "e" * 64}))
    assert "✗ The merged adapter is the trained one: no, eeeeeeeeeeee is not cccccccccccc" in built(run)[0]


def test_training_on_held_out_prompts_is_shown(tmp_path):
    run = make_run(tmp_path / "run")
    assert "✓ None of the 839 held-out prompts is among the training prompts." in built(run)[0]
    card = json.loads((run / "data_prep" / "data_card.json").read_text())
    card["contamination"]["overlapping"] = 12
    (run / "data_prep" / "data_card.json").write_text(json.dumps(card))
    assert "✗ 12 of the 839 held-out prompts is among" in built(run)[0]


def test_report_is_replaced_whole_and_is_the_same_again(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "report").mkdir()
    (run / "report" / "report.html").write_text("old")
    first = built(run)
    assert built(run) == first
    assert sorted(path.name for path in (run / "report").iterdir()) == ["model_card.md", "report.html"]
    assert not [path for path in run.iterdir() if "partial" in path.name]


def test_model_card_has_front_matter_that_the_hub_accepts(tmp_path):
    run = make_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["uri"] = "hf://Qwen/Qwen2.5-0.5B-Instruct@main"
    (run / "config.json").write_text(json.dumps(config))
    card = built(run)[2]
    _, front, body = card.split("---\n", 2)
    matter = yaml.safe_load(front)
    assert matter["base_model"] == "Qwen/Qwen2.5-0.5B-Instruct"
    assert matter["library_name"] == "peft"
    assert {"lora", "grpo"} <= set(matter["tags"])
    assert matter["model-index"][0]["results"][0]["metrics"] == [{"type": "accuracy", "value": 447 / 512}]
    assert "| this adapter | 87.3% | 84.4% to 90.2% | 512 |" in body
    assert "vllm serve Qwen/Qwen2.5-0.5B-Instruct --enable-lora --max-lora-rank 32" in body
    assert "5,629 were kept, 371 dropped and 3 quarantined" in body


def test_base_model_outside_the_hub_stays_out_of_the_front_matter(tmp_path):
    card = built(make_run(tmp_path / "run"))[2]
    assert "base_model" not in yaml.safe_load(card.split("---\n", 2)[1])
    assert "local copy of `bundled://smollm2-135m-instruct`" in card


def test_metrics_for_the_console_are_flat_finite_numbers(tmp_path):
    metrics = report_metrics(make_run(tmp_path / "run"))
    assert metrics["accuracy_candidate"] == 447 / 512
    assert metrics["gate_passed"] == 1.0
    assert metrics["seconds_lora_rl"] == 611.3
    assert all(isinstance(value, float) for value in metrics.values())
    assert report_metrics(stop_after(make_run(tmp_path / "other"), 1)) == {
        "seconds_check": 0.4, "peak_rss_bytes_check": 180_000_000.0,
    }  # fmt: skip


def test_missing_folder_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        build_report(tmp_path / "nowhere")
