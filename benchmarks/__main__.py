"""Every benchmark in a process of its own, then one table: `make bench`, or `python -m benchmarks [NAME …]`.

A benchmark that cannot run here is skipped, and the table says why. Each saves its own dated file under `results/`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.common import REPOSITORY, RESULTS, Row, table

GSM8K = Path(os.environ.get("GSM8K") or REPOSITORY / "data" / "gsm8k" / "train.jsonl")


@dataclass(frozen=True)
class Benchmark:
    """A script, how it is called, and what it needs.

    Attributes:
        arguments: of a whole run.
        quick: arguments in place of them, for a look at whether it works.
        missing: returns why it cannot run here; empty when it can.
    """

    name: str
    arguments: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()
    missing: Callable[[], str] = lambda: ""


def no_gsm8k() -> str:
    """GSM8K's training file is no part of this repository."""
    return "" if GSM8K.is_file() else f"{GSM8K} is missing; name GSM8K's training file, make bench GSM8K=train.jsonl"


def no_trl() -> str:
    """TRL is an extra."""
    return "" if find_spec("trl") else "trl is not installed; pip install 'tuneloop[bench]'"


def no_trl_on_a_cpu() -> str:
    """Its clock does not wait for a GPU; there, `gpu.py` compares with TRL."""
    return no_trl() or on_a_gpu()


def on_a_gpu() -> str:
    """For those that read the host's memory."""
    import torch

    return "it measures a CPU; on a GPU run benchmarks/gpu.py" if torch.cuda.is_available() else ""


def no_gpu() -> str:
    """Nor is every machine one with a GPU."""
    import torch

    return no_trl() or ("" if torch.cuda.is_available() else "there is no GPU")


LOOK = ("--config", "configs/ci.toml", "--updates", "2", "--sweep", "512:64")
TINY_GPU = ("--shape", "tiny", "--prompts", "2", "--group", "2", "--new-tokens", "8", "--steps", "1")
BENCHMARKS = (
    Benchmark("trl_grpo", missing=no_trl_on_a_cpu),
    Benchmark("lora_vs_full", quick=LOOK, missing=on_a_gpu),
    Benchmark("engines", quick=("--work", "2x2x8")),
    Benchmark("packing", ("--gsm8k", str(GSM8K.parent)), ("--gsm8k", str(GSM8K.parent), "--prompts", "64"), no_gsm8k),
    Benchmark("joint", missing=on_a_gpu),
    Benchmark("plan"),
    Benchmark("rank_schedule", quick=("--seeds", "1")),
    Benchmark("flowrl_toy"),
    Benchmark("merge"),
    Benchmark("data_prep", ("--gsm8k", str(GSM8K)), ("--gsm8k", str(GSM8K)), no_gsm8k),
    Benchmark("gpu", quick=TINY_GPU, missing=no_gpu),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one benchmark: its rows, or one line in place of them."""

    name: str
    rows: list[Row]
    told: str
    failed: bool = False


def main() -> int:
    """Run them, print the table; returns 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these: " + ", ".join(b.name for b in BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="small sizes: does it work?")
    arguments = parser.parse_args()
    known = {benchmark.name for benchmark in BENCHMARKS}
    if unknown := [name for name in arguments.names if name not in known]:
        parser.error(f"no benchmark {unknown[0]!r}; known: {', '.join(sorted(known))}")
    chosen = [b for b in BENCHMARKS if not arguments.names or b.name in arguments.names]
    outcomes = [run(benchmark, quick=arguments.quick) for benchmark in chosen]
    print("\n" + summary(outcomes))
    return int(any(outcome.failed for outcome in outcomes))


def run(benchmark: Benchmark, *, quick: bool) -> Outcome:
    """One benchmark in its process; what it saves is read back."""
    script = REPOSITORY / "benchmarks" / f"{benchmark.name}.py"
    reason = benchmark.missing() if script.is_file() else f"{script.relative_to(REPOSITORY)} is missing"
    if reason:
        print(f"==> {benchmark.name}: skipped, {reason}", flush=True)
        return Outcome(benchmark.name, [], f"skipped: {reason}")
    print(f"==> {benchmark.name}", flush=True)
    started = time.time()
    arguments = benchmark.quick if quick and benchmark.quick else benchmark.arguments
    command = [sys.executable, "-m", f"benchmarks.{benchmark.name}", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False)
    seconds = time.time() - started
    if done.returncode:
        return Outcome(benchmark.name, [], f"failed with exit code {done.returncode}; see above", failed=True)
    saved = [path for path in RESULTS.glob(f"*-{benchmark.name}.json") if path.stat().st_mtime >= started - 1]
    rows = [Row(**row) for path in saved for row in json.loads(path.read_text()).get("table", [])]
    where = ", ".join(str(path.relative_to(REPOSITORY)) for path in saved) or "nothing saved; see above"
    return Outcome(benchmark.name, rows, f"{seconds:.0f} s, {where}")


def summary(outcomes: list[Outcome]) -> str:
    """All rows under one head, each benchmark's place behind its name."""
    rows = []
    for outcome in outcomes:
        rows.append(Row(f"{outcome.name}: {outcome.told}" if not outcome.rows else f"{outcome.name}", "", "", None, ""))
        rows += [Row(f"  {row.what}", row.ours, row.against, row.ratio, row.floor) for row in outcome.rows]
    notes = [f"{outcome.name}: {outcome.told}" for outcome in outcomes if outcome.rows]
    return table(rows) + "\n\n" + "\n".join(notes)


if __name__ == "__main__":
    sys.exit(main())
