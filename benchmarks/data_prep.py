"""How fast data preparation is beside the tokenizer alone, and how much memory it needs.

Rows are derived from a GSM8K file: every question gets a sentence of its own, so that all are distinct. The step runs
as its users run it, in a process of its own; start-up counts. The tokenizer alone encodes the same rendered prompts and
completions on all cores, before and after the step; the faster of the two counts, and rendering is not timed. Where the
two differ by more than a fifth, the machine was busy with something else: the result is printed and not saved.

    python -m benchmarks.data_prep --gsm8k train.jsonl --rows 1000000
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from components.config import RunConfig, load_run_config

RESULTS = Path(__file__).parent / "results"
REFERENCE_ROWS = 50_000
ALLOWED_DRIFT = 0.2
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
    if not quiet(result):
        sys.exit("not saved: the machine was busy, the tokenizer alone ran at two speeds; try again")
    if not arguments.no_save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{result['date']}-{result['hardware']}-data_prep.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(f"saved {path}")


def quiet(result: dict[str, Any]) -> bool:
    """Whether the tokenizer was as fast after the step as before it."""
    before, after = result["tokenizer_before"], result["tokenizer_after"]
    return all(abs(after[name] / before[name] - 1.0) <= ALLOWED_DRIFT for name in before)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Derive the rows, run the step and the tokenizer, compare."""
    data = folder / "rows.jsonl"
    derive_rows(arguments.gsm8k, arguments.rows, data)
    config = write_config(folder, data, arguments)
    run_config = load_run_config(config)
    before = tokenizer_rates(run_config, min(REFERENCE_ROWS, arguments.rows))
    command = [sys.executable, "-m", "components.data_prep", "--config", config, "--output", folder / "output"]
    cpu_before = _cpu_seconds(resource.RUSAGE_CHILDREN)
    subprocess.run([str(part) for part in command], check=True)
    cpu = _cpu_seconds(resource.RUSAGE_CHILDREN) - cpu_before
    after = tokenizer_rates(run_config, min(REFERENCE_ROWS, arguments.rows))
    step = json.loads((folder / "output" / "step.json").read_text())
    alone = {name: max(before[name], after[name]) for name in before}
    rate = arguments.rows / step["seconds"]
    return {
        "benchmark": "data_prep",
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "rows": arguments.rows,
        "near_duplicates": arguments.near_duplicates,
        "summary": step["summary"],
        "seconds": step["seconds"],
        "rows_per_second": round(rate),
        "peak_rss_mb": round(step["peak_rss_bytes"] / 1e6),
        "cpu_microseconds_a_row": round(1e6 * cpu / arguments.rows, 1),
        "tokenizer_before": {name: round(value) for name, value in before.items()},
        "tokenizer_after": {name: round(value) for name, value in after.items()},
        "ratio_to_tokenizer": {name: round(rate / value, 3) for name, value in alone.items()},
    }


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


def tokenizer_rates(config: RunConfig, rows: int) -> dict[str, float]:
    """Rows per second of the tokenizer's two batch calls on the rendered prompts and completions."""
    from components.data_prep.step import make_source
    from tuneloop.data.prompt_template import PromptTemplate
    from tuneloop.data.tokens import load_tokenizer
    from tuneloop.models.sources import resolve_model

    tokenizer: Any = load_tokenizer(resolve_model(config.model.uri))
    template, backend = PromptTemplate(tokenizer), tokenizer.backend_tokenizer
    source = make_source(config.data_prep.sources[0], config.task)
    parsed = (source.parser(record.value) for record in islice(source.records(), rows) if record.value is not None)
    texts = [text for row in parsed for text in (template.render(row.roles, row.contents), row.completion)]
    rates = {}
    for name in ("encode_batch", "encode_batch_fast"):
        encode = getattr(backend, name)
        started = time.perf_counter()
        for chunk in _chunks(texts):
            encode(chunk, add_special_tokens=False)
        rates[name] = rows / (time.perf_counter() - started)
    return rates


def _cpu_seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _chunks(texts: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(texts), CHUNK_TEXTS):
        yield texts[start : start + CHUNK_TEXTS]


def hardware() -> str:
    """The machine in generic words: cores, and the widest vector instructions."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vector = next((name for flag, name in (("avx512f", "avx512"), ("avx2", "avx2")) if flag in flags), "scalar")
    return f"{os.cpu_count()}-core-{vector}"


if __name__ == "__main__":
    main()
