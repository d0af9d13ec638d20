"""Changing ranks against fixed ones on the ci task: final accuracy, and the adapter's parameters, over several seeds.

    python -m benchmarks.rank_schedule

Every arm runs the same updates on the same data; a seed's arms that start at the same rank share one warm-up. Accuracy
is greedy, on all validation prompts, after the last update.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import REPOSITORY, Row, save

CONFIG = REPOSITORY / "configs" / "ci.toml"
UPDATES = 60  # the ci config's


@dataclass(frozen=True)
class Arm:
    """The rank that the warm-up starts with, and the schedule of RL."""

    name: str
    rank: int
    schedule: str = '{kind="off"}'


ARMS = (
    Arm("fixed 8", 8),
    Arm("fixed 4", 4),
    Arm("8 to 4", 8, '{kind="spectrum", every=5, final=4}'),
    Arm("fixed 2", 2),
    Arm("8 to 2", 8, '{kind="spectrum", every=5, final=2}'),
    Arm("8 cut to 2 at update 5", 8, '{kind="spectrum", every=5, initial=2, final=2, growth=0}'),
    Arm("2, dealt out anew", 2, '{kind="spectrum", every=5}'),
)


def main() -> None:
    """Run every arm for every seed, print the table, save; what is finished is saved after each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=UPDATES, help="of RL")
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], metavar="NAME")
    arguments = parser.parse_args()
    arms = [arm for arm in ARMS if arm.name in arguments.arms]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(1, arguments.seeds + 1):
            runs += run_seed(Path(scratch), seed, arms, arguments.updates)
            publish(runs, arms, arguments.updates)


def publish(runs: list[dict[str, Any]], arms: Sequence[Arm], updates: int) -> None:
    """Print the tables and save what was measured so far."""
    summaries = [summary(arm, [run for run in runs if run["arm"] == arm.name]) for arm in arms]
    print_table(summaries)
    seeds = len({run["seed"] for run in runs})
    details = {"config": "configs/ci.toml", "updates": updates, "seeds": seeds, "arms": summaries, "runs": runs}
    name = "rank_schedule" if updates == UPDATES else f"rank_schedule_{updates}"
    save(name, [compared(row, summaries[0], updates) for row in summaries[1:]], details)


def compared(row: dict[str, Any], fixed: dict[str, Any], updates: int) -> Row:
    """An arm's accuracy against the first arm's."""
    share = row["parameters_last"] / fixed["parameters_last"]
    return Row(
        f"accuracy after {updates} updates, ranks {row['arm']}, {share:.0%} of the parameters",
        f"{row['accuracy']:.1%}",
        f"{fixed['accuracy']:.1%} ({fixed['arm']})",
        row["accuracy"] / fixed["accuracy"],
        "1: asked for",
    )


def run_seed(scratch: Path, seed: int, arms: Sequence[Arm], updates: int) -> list[dict[str, Any]]:
    """All arms with one seed."""
    from components.data_prep.step import STEP as DATA_PREP
    from components.sft_warmup.step import STEP as SFT_WARMUP

    data = execute_step(DATA_PREP, {}, scratch / "data", ())
    warmups: dict[int, Path] = {}
    runs = []
    for arm in arms:
        settings = (f"seed={seed}", f"lora.rank={arm.rank}")
        if arm.rank not in warmups:
            folder = scratch / f"warmup-{seed}-{arm.rank}"
            warmups[arm.rank] = execute_step(SFT_WARMUP, {"data": data}, folder, settings)
        folder = scratch / f"rl-{seed}-{ARMS.index(arm)}"
        runs.append(run_arm(arm, seed, data, warmups[arm.rank], folder, (*settings, *length(updates))))
    return runs


def length(updates: int) -> tuple[str, ...]:
    """So many updates, validated on everything behind the last."""
    sections = {"updates": updates, "validate_every": updates, "checkpoint_every": updates}
    return (*(f"lora_rl.{key}={value}" for key, value in sections.items()), "lora_rl.validation_prompts=100000")


def run_arm(arm: Arm, seed: int, data: Path, warmup: Path, folder: Path, settings: tuple[str, ...]) -> dict[str, Any]:
    """One RL run's figures."""
    from components.lora_rl.step import STEP as LORA_RL
    from tuneloop.models.adapter_io import load_adapter

    schedule = f"lora_rl.rank_schedule={arm.schedule}"
    started = time.perf_counter()
    execute_step(LORA_RL, {"data": data, "warmup": warmup}, folder, (*settings, schedule))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sizes = {
        name: adapter_size(load_adapter(place / "adapter")) for name, place in (("first", warmup), ("last", folder))
    }
    during = [row.get("rank/parameters", sizes["first"]) for row in rows[1:]]
    return {
        "arm": arm.name,
        "seed": seed,
        "accuracy_first": rows[0]["validation/accuracy"],
        "accuracy_last": rows[-1]["validation/accuracy"],
        "reward_last_ten": statistics.fmean(row["reward/mean"] for row in rows[1:][-10:]),
        "parameters_last": sizes["last"],
        "parameters_mean": statistics.fmean(during),
        "ranks_last": sorted(a.shape[0] for a, _ in load_adapter(folder / "adapter").factors.values()),
        "dropped": [row["rank/dropped"] for row in rows[1:] if row.get("rank/dropped")],
        "seconds": round(time.perf_counter() - started, 2),
    }


def adapter_size(adapter: Any) -> int:
    """Parameters of an adapter."""
    return sum(a.numel() + b.numel() for a, b in adapter.factors.values())


def execute_step(step: Any, inputs: dict[str, Path], output: Path, overrides: tuple[str, ...]) -> Path:
    """Run a step of the ci config."""
    from components.config import load_run_config
    from components.runner import execute

    config = load_run_config(CONFIG, overrides)
    execute(step, config, {name: str(path) for name, path in inputs.items()}, str(output))
    return output


def summary(arm: Arm, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the standard deviation of what is compared."""
    accuracies = [run["accuracy_last"] for run in runs]
    return {
        "arm": arm.name,
        "accuracy": round(statistics.fmean(accuracies), 4),
        "accuracy_sd": round(statistics.stdev(accuracies), 4) if len(runs) > 1 else 0.0,
        "accuracy_before": round(statistics.fmean(run["accuracy_first"] for run in runs), 4),
        "reward_last_ten": round(statistics.fmean(run["reward_last_ten"] for run in runs), 4),
        "parameters_last": round(statistics.fmean(run["parameters_last"] for run in runs)),
        "parameters_mean": round(statistics.fmean(run["parameters_mean"] for run in runs)),
        "largest_dropped": round(max((value for run in runs for value in run["dropped"]), default=0.0), 4),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """The table of docs/lora.md."""
    print(
        "| arm | accuracy before | after RL (sd) | reward, last 10 updates | parameters at the end | on average "
        "| dropped, most |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['arm']} | {row['accuracy_before']:.1%} | {row['accuracy']:.1%} ({row['accuracy_sd']:.1%}) "
            f"| {row['reward_last_ten']:.3f} | {row['parameters_last']:,} | {row['parameters_mean']:,} "
            f"| {row['largest_dropped']:.1%} |"
        )


if __name__ == "__main__":
    main()
