"""A run folder as the steps leave it, made without running them: small, deterministic, and with every part."""

import json
import math
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from components.config import load_run_config
from tuneloop.config import config_digest, resolved_json

STEPS = ("check", "data_prep", "sft_warmup", "lora_rl", "merge_adapter", "evaluate", "promote")
SECONDS = (0.4, 6.2, 94.0, 611.3, 12.8, 143.5, 0.9)
ATTACK = '</script></pre><img src=x onerror="document.title=\'owned\'"><script>document.title="owned"</script>'
REPOSITORY = Path(__file__).resolve().parent.parent


def make_run(folder: Path, *, updates: int = 40, promoted: bool = True, incumbent: bool = True) -> Path:
    """A whole finished run in `folder`."""
    config = load_run_config(REPOSITORY / "configs" / "demo.toml", (f"lora_rl.updates={updates}",))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(resolved_json(config))
    for i, (step, seconds) in enumerate(zip(STEPS, SECONDS, strict=True)):
        (folder / step).mkdir()
        (folder / step / "config.json").write_text(resolved_json(config))
        _write(
            folder / step / "step.json",
            {
                "step": step, "fingerprint": f"{i:064x}", "seconds": seconds, "summary": {},
                "peak_rss_bytes": 180_000_000 + 640_000_000 * (i % 4), "config_digest": config_digest(config),
                "inputs": {}, "code_version": "0.1.0", "finished_at": f"2026-11-22T14:{10 + i}:05Z",
            },
        )  # fmt: skip
    _data(folder / "data_prep")
    _warmup(folder / "sft_warmup")
    _rl(folder / "lora_rl", updates)
    _write(folder / "merge_adapter" / "merge.json", {"adapter_digest": "c" * 64, "shards": 1})
    _evaluation(folder / "evaluate", promoted, incumbent)
    _write(
        folder / "promote" / "promotion.json",
        {
            "promoted": promoted, "adapter_name": "arithmetic", "version": 4 if promoted else None,
            "alias": "production", "previous_version": 3 if incumbent else None, "reason": "the gate passed",
        },
    )  # fmt: skip
    return folder


def stop_after(folder: Path, reached: int) -> Path:
    """Keep only the first `reached` steps of a run."""
    for step in STEPS[reached:]:
        shutil.rmtree(folder / step)
    return folder


def fail_in(folder: Path, step: str, message: str, exit_code: int, *, lines: int = 0) -> Path:
    """Make `step` the one that failed: later ones are gone, its metrics end after `lines` updates."""
    at = STEPS.index(step)
    stop_after(folder, at + 1)
    partial = folder / f"{step}.partial"
    (folder / step).rename(partial)
    for name in ("step.json", "config.json", "rl.json", "warmup.json"):
        (partial / name).unlink(missing_ok=True)
    if lines:
        metrics = partial / "metrics.jsonl"
        kept = metrics.read_text().splitlines()[:lines]
        metrics.write_text("\n".join(kept) + '\n{"update": 99, "rew')  # killed while writing
    _write(folder / f"{step}.failed.json", {"step": step, "exit_code": exit_code, "message": message})
    return folder


def _data(folder: Path) -> None:
    examples = [
        {"messages": [{"role": "user", "content": f"State the final answer to: {a} + {b} ="}], "answer": str(a + b)}
        for a, b in ((12, 57), (91, 18), (44, 35), (70, 29))
    ]
    _write(
        folder / "data_card.json",
        {
            "rows": {"read": 6003, "kept": 5629, "quarantined": 3,
                     "dropped": {"exact_duplicate": 371, "near_duplicate": 0, "contaminated": 0}},
            "splits": {"train": 4790, "validation": 275, "test": 564},
            "contamination": {"training_rows": 4790, "evaluation_rows": 839, "overlapping": 0},
            "lengths": {"prompt_tokens": {"min": 31, "p50": 34, "p95": 36, "max": 36, "mean": 34.1},
                        "completion_tokens": {"min": 2, "p50": 3, "p95": 4, "max": 5, "mean": 3.42}},
            "sources": [{"source": "reasoning_gym:chain_sum", "read": 6003, "kept": 5629}],
            "fingerprint": "d" * 64, "examples": examples,
        },
    )  # fmt: skip
    bad = {"source": "reasoning_gym:chain_sum", "line": 17, "reason": "answer is empty", "text": ATTACK}
    _write_lines(folder / "quarantine.jsonl", [bad] * 3)
    rows = [
        {"id": f"{i:032x}", "messages": [{"role": "user", "content": f"State the final answer to: {i} + 40 ="}],
         "answer": str(i + 40)}
        for i in range(512)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "test.parquet")


def _warmup(folder: Path) -> None:
    rows = []
    for update in range(1, 26):
        row = {
            "update": update, "time": 3.5 * update, "loss/train": 0.35 + 2.4 * math.exp(-update / 6),
            "gradient/norm": 4.2 * math.exp(-update / 9), "learning_rate": 3e-4 * (1 - update / 26),
            "tokens_per_second/update": 1450 + 30 * math.sin(update),
        }  # fmt: skip
        if update % 10 == 0 or update == 25:
            row["loss/validation"] = 0.38 + 2.3 * math.exp(-update / 6)
        rows.append(row)
    _write_lines(folder / "metrics.jsonl", rows)
    loss = {"first": 1.1, "last": 0.41}
    _write(folder / "warmup.json", {"mode": "lora", "base_uri": "bundled://smollm2-135m-instruct", "updates": 25,
                                    "adapter_digest": "b" * 64, "validation_loss": loss})  # fmt: skip


def _rl(folder: Path, updates: int) -> None:
    noise = random.Random(7)
    rows, samples = [], []
    for update in range(1, updates + 1):
        done = update / updates
        reward = 0.42 + 0.46 * (1 - math.exp(-3 * done)) + noise.gauss(0, 0.025)
        row = {
            "update": update, "time": 15.0 * update, "reward/mean": reward, "reward/std": 0.35 - 0.1 * done,
            "reward/reasoning_gym/mean": reward, "groups/zero_spread_share": 0.25 + 0.35 * done,
            "kl/reference": 0.09 * done + noise.random() * 0.004, "entropy": 0.9 * math.exp(-2 * done) + 0.08,
            "clip/share": 0.002 * noise.random(), "completion/tokens_mean": 3.6 + 0.4 * math.exp(-4 * done),
            "completion/truncated_share": 0.08 * math.exp(-6 * done), "gradient/norm": 0.6 + noise.random(),
            "learning_rate": 1e-4, "divergence/kl": 0.0004 + 0.0001 * noise.random(),
            "divergence/max": 0.03 + 0.02 * noise.random(), "tokens_per_second/rollout": 2900 + noise.gauss(0, 90),
            "tokens_per_second/score": 7400, "tokens_per_second/update": 3100, "seconds/collect": 4.1,
            "seconds/score": 1.4, "seconds/update": 3.3, "seconds/sync": 0.2, "seconds/save": 0.1,
            "memory/peak_rss_bytes": 1_900_000_000 + 1e6 * update, "odd/new_metric": noise.random(),
        }  # fmt: skip
        if update % max(1, updates // 8) == 0:
            right = min(0.98, 0.44 + 0.46 * (1 - math.exp(-3 * done)))
            row |= {"validation/reward": right, "validation/accuracy": right}
            samples += [_sample(update, prompt, done) for prompt in range(4)]
        rows.append(row)
    _write_lines(folder / "metrics.jsonl", rows)
    _write_lines(folder / "samples.jsonl", samples)
    _write(folder / "rl.json", {"updates": updates, "adapter_digest": "c" * 64, "reference_digest": "b" * 64,
                                "validation_accuracy": {"first": 0.47, "last": 0.87},
                                "base_uri": "bundled://smollm2-135m-instruct"})  # fmt: skip


def _sample(update: int, prompt: int, done: float) -> dict:
    a, b = 23 + 17 * prompt, 58 - 9 * prompt
    right = done >= 0.25 * prompt
    completion = str(a + b) if right else (ATTACK if prompt == 3 and done < 0.2 else str(a + b + 10))
    return {
        "update": update, "prompt_id": f"{prompt:032x}", "prompt": f"State the final answer to: {a} + {b} =",
        "answer": str(a + b), "completion": completion, "reward": float(right),
        "rewards": {"reasoning_gym": float(right)},
    }  # fmt: skip


def _evaluation(folder: Path, promoted: bool, incumbent: bool) -> None:
    right = {"base": 6, "sft": 236, "candidate": 447 if promoted else 331, "incumbent": 324}
    if not incumbent:
        del right["incumbent"]
    models = {}
    for name, hits in right.items():
        share = hits / 512
        half = 1.96 * math.sqrt(share * (1 - share) / 512)
        interval = [max(0.0, share - half), min(1.0, share + half)]
        score = {"value": share, "n": 512, "ci95": interval}
        best_of_4 = {"value": min(1.0, share * 1.06), "n": 512, "ci95": [min(1.0, end * 1.06) for end in interval]}
        models[name] = {
            "accuracy": score, "pass_at": {"1": score, "4": best_of_4},
            "metrics": {"completion_tokens": 3.4 if name != "base" else 7.8, "reasoning_gym": share,
                        "truncated_share": 0.0 if name != "base" else 0.81},
        }  # fmt: skip
    comparisons = [
        _comparison(right, reference, metric) for reference in right if reference != "candidate"
        for metric in ("accuracy", "pass_at_1")
    ]  # fmt: skip
    checks = [_check(right, name) for name in ("base", "incumbent") if name in right]
    failed = [check["detail"] for check in checks if not check["passed"]]
    gate = {
        "passed": not failed, "p_value": max(_p_value(right, check["name"].split()[1]) for check in checks),
        "reason": "; ".join(failed) or f"candidate {right['candidate'] / 512:.1%} accuracy beats what is there",
        "checks": checks,
    }  # fmt: skip
    _write(
        folder / "evaluation.json",
        {
            "prompts": 512, "samples": 4, "seed": 17, "confidence": 0.95, "adapter_digest": "c" * 64,
            "incumbent": {"version": 3, "adapter_digest": "a" * 64} if incumbent else None,
            "models": models, "comparisons": comparisons, "gate": gate,
        },
    )  # fmt: skip
    rows = [
        {"model": name, "prompt_id": f"{i:032x}", "sample": sample, "completion": str(i + 40 + (i >= hits)),
         "tokens": 3, "truncated": False, "correct": i < hits, "reward": float(i < hits)}
        for name, hits in right.items() for i in range(512) for sample in (-1, 0)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "answers.parquet")


def _comparison(right: dict[str, int], reference: str, metric: str) -> dict:
    difference = (right["candidate"] - right[reference]) / 512
    return {
        "reference": reference, "metric": metric, "difference": difference,
        "ci95": [difference - 0.043, difference + 0.043], "p_value": _p_value(right, reference), "n": 512,
        "wins": max(0, right["candidate"] - right[reference]) + 9, "losses": 9,
    }  # fmt: skip


def _check(right: dict[str, int], reference: str) -> dict:
    points, p_value = (right["candidate"] - right[reference]) / 5.12, _p_value(right, reference)
    told = "beats" if p_value < 0.01 else "is not proven better than"
    detail = f"candidate {right['candidate'] / 5.12:.1f} % {told} {reference} ({points:+.1f} points, p = {p_value:.2g})"
    return {"name": f"beats {reference}", "passed": p_value < 0.01, "detail": detail}


def _p_value(right: dict[str, int], reference: str) -> float:
    return 3.1e-24 if right["candidate"] - right[reference] > 50 else 0.281


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
