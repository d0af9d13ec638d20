"""How fast data preparation is beside the tokenizer alone, and how much memory it needs.

Rows are derived from a GSM8K file: every question gets a sentence of its own, so that all are distinct. The step runs
as its users run it, in a process of its own, and its start-up counts. Every few seconds it is halted, and the tokenizer
alone encodes the same rendered prompts and completions on all cores for a while; rendering is not timed. So both meet
the same machine, whatever else it does. The ratio of CPU times is given beside the ratio of rates: it hardly changes
when the machine is busy.

    python -m benchmarks.data_prep --gsm8k train.jsonl --rows 1000000
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from components.config import RunConfig, load_run_config

RESULTS = Path(__file__).parent / "results"
REFERENCE_ROWS = 50_000
STEP_SECONDS, TOKENIZER_SECONDS = 4.0, 3.0  # of a turn
CHUNK_TEXTS = 1024


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True, help="a GSM8K file (JSON Lines) to derive rows from")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", default="bundled://smollm2-135m-instruct", help="whose tokenizer is used")
    parser.add_argument("--near-duplicates", action="store_true", help="with near-duplicate removal")
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="data-prep-") as folder:
        result = measure(arguments, Path(folder))
    print(json.dumps(result, indent=2))
    if not arguments.no_save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{result['date']}-{result['hardware']}-data_prep.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"saved {path}")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Derive the rows, run the step and the tokenizer by turns, compare."""
    data = folder / "rows.jsonl"
    derive_rows(arguments.gsm8k, arguments.rows, data)
    config = write_config(folder, data, arguments)
    alone = TokenizerAlone(load_run_config(config), min(REFERENCE_ROWS, arguments.rows))
    command = [sys.executable, "-m", "components.data_prep", "--config", config, "--output", folder / "output"]
    cpu_before = _cpu_seconds(resource.RUSAGE_CHILDREN)
    seconds = run_by_turns([str(part) for part in command], alone)
    cpu = _cpu_seconds(resource.RUSAGE_CHILDREN) - cpu_before
    step = json.loads((folder / "output" / "step.json").read_text())
    rate, cpu_a_row = arguments.rows / seconds, cpu / arguments.rows
    return {
        "benchmark": "data_prep",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "rows": arguments.rows,
        "near_duplicates": arguments.near_duplicates,
        "summary": step["summary"],
        "peak_rss_mb": round(step["peak_rss_bytes"] / 1e6),
        "seconds": round(seconds, 1),
        "rows_per_second": round(rate),
        "cpu_microseconds_a_row": round(1e6 * cpu_a_row, 1),
        "tokenizer_rows_per_second": {call.name: round(call.rate()) for call in alone.calls},
        "tokenizer_cpu_microseconds_a_row": {call.name: round(1e6 * call.cpu_a_row(), 1) for call in alone.calls},
        "ratio_of_rates": {call.name: round(rate / call.rate(), 3) for call in alone.calls},
        "ratio_of_cpu_time": {call.name: round(call.cpu_a_row() / cpu_a_row, 3) for call in alone.calls},
    }


def run_by_turns(command: list[str], alone: "TokenizerAlone") -> float:
    """Run a command to its end with halts in which the tokenizer works alone; returns the seconds without the halts."""
    halted, started = 0.0, time.perf_counter()
    process = subprocess.Popen(command)
    try:
        while True:
            try:
                if process.wait(timeout=STEP_SECONDS):
                    raise SystemExit(f"the step failed with exit code {process.returncode}")
                return time.perf_counter() - started - halted
            except subprocess.TimeoutExpired:
                begun = time.perf_counter()
                process.send_signal(signal.SIGSTOP)
                alone.work(TOKENIZER_SECONDS)
                process.send_signal(signal.SIGCONT)
                halted += time.perf_counter() - begun
    finally:
        process.kill()


def derive_rows(gsm8k: Path, rows: int, target: Path) -> None:
    """Write distinct rows: question i of the file, with a sentence that names the row."""
    originals = [json.loads(line) for line in gsm8k.read_text().splitlines()]
    with target.open("w") as file:
        for index in range(rows):
            row = originals[index % len(originals)]
            question = f"{row['question']} This is problem {index // 1000} on sheet {index % 1000}."
            file.write(json.dumps({"question": question, "answer": row["answer"]}) + "\n")


def write_config(folder: Path, data: Path, arguments: argparse.Namespace) -> Path:
    """The run's config: GSM8K's format, every filter at its default but near-duplicate removal."""
    config = folder / "config.toml"
    config.write_text(
        f'name = "benchmark"\nmodel = {{ uri = "{arguments.model}", max_length = 1024 }}\n'
        '[task]\nrewards = [{ kind = "numeric" }]\n'
        f"[data_prep]\nnear_duplicates.enabled = {str(arguments.near_duplicates).lower()}\n"
        f'[[data_prep.sources]]\nkind = "gsm8k"\nuri = "{data}"\n'
    )
    return config


@dataclass
class Call:
    """One of the tokenizer's batch calls, and what it has done so far."""

    name: str
    encode: Callable[..., Any]
    rows: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def work(self, texts: list[str]) -> None:
        """Encode the texts of so many rows, prompts and completions."""
        cpu, started = time.process_time(), time.perf_counter()
        self.encode(texts, add_special_tokens=False)
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += time.process_time() - cpu
        self.rows += len(texts) / 2

    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds

    def cpu_a_row(self) -> float:
        """Seconds of CPU time a row, all cores together."""
        return self.cpu_seconds / self.rows


class TokenizerAlone:
    """The tokenizer on rendered prompts and completions, round and round."""

    def __init__(self, config: RunConfig, rows: int):
        from components.data_prep.step import make_source
        from tuneloop.data.prompt_template import PromptTemplate
        from tuneloop.data.tokens import load_tokenizer
        from tuneloop.models.sources import resolve_model

        tokenizer: Any = load_tokenizer(resolve_model(config.model.uri))
        template, source = PromptTemplate(tokenizer), make_source(config.data_prep.sources[0], config.task)
        parsed = [source.parser(record.value) for record in islice(source.records(), rows) if record.value is not None]
        texts = [text for row in parsed for text in (template.render(row.roles, row.contents), row.completion)]
        self._chunks = cycle([texts[start : start + CHUNK_TEXTS] for start in range(0, len(texts), CHUNK_TEXTS)])
        backend = tokenizer.backend_tokenizer
        self.calls = [Call(name, getattr(backend, name)) for name in ("encode_batch", "encode_batch_fast")]

    def work(self, seconds: float) -> None:
        """Let each call work for half of the time."""
        for call in self.calls:
            end = time.perf_counter() + seconds / len(self.calls)
            while time.perf_counter() < end:
                call.work(next(self._chunks))


def _cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def hardware() -> str:
    """The machine in generic words: cores, and the widest vector instructions."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vector = next((name for flag, name in (("avx512f", "avx512"), ("avx2", "avx2")) if flag in flags), "scalar")
    return f"{os.cpu_count()}-core-{vector}"


if __name__ == "__main__":
    main()
