"""Padding that is not there: the share of trained positions that are real tokens, on GSM8K's lengths.

    python -m benchmarks.packing [--gsm8k FOLDER]

Prompts are GSM8K's questions in SmolLM2's chat template, completions its solutions. For RL a prompt has `--group`
completions: their lengths are those of solutions drawn at random, because a model's own answers differ in length as
solutions do. Counted, for the same sequences:

- linear layers: rows that matrix products see, ours from the packed batch as it is trained, TRL's from its
  layout (prompts padded at the left to the longest of the batch, completions at the right);
- attention: pairs of query and key that are computed, ours in blocks a prompt wide, TRL's as the full square;
- the prompt: we compute it once a group, TRL once a completion.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY, Row, save

GSM8K = REPOSITORY.parent / "shared" / "data" / "gsm8k"
MODEL = "bundled://smollm2-135m-instruct"
TARGET = 0.97


def main() -> None:
    """Count, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, default=GSM8K, help="folder with train.jsonl")
    parser.add_argument("--model", default=MODEL, help="whose tokenizer and chat template")
    parser.add_argument("--prompts", type=int, default=1024, help="rows that are counted")
    parser.add_argument("--prompts-per-update", type=int, default=32)
    parser.add_argument("--group", type=int, default=8, help="completions a prompt")
    parser.add_argument("--batch", type=int, default=8, help="TRL's per_device_train_batch_size, in completions")
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    arguments = parser.parse_args()
    prompts, solutions = token_lengths(arguments)
    rl = groups_of(prompts, solutions, arguments.group)
    sft = [(prompt, [solution]) for prompt, solution in zip(prompts, solutions, strict=True)]
    results = {"rl": count(rl, arguments), "sft": count(sft, arguments)}
    rows = [row for name, counted in results.items() for row in rows_of(name, counted, arguments)]
    settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    save("packing", rows, {"settings": settings, "counts": results})


def token_lengths(arguments: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Tokens of each question as a prompt, and of its solution with the end token."""
    from tuneloop.data.chat import render_completions, render_prompts
    from tuneloop.models.load import load_tokenizer
    from tuneloop.models.sources import resolve_model

    file = arguments.gsm8k / "train.jsonl"
    if not file.is_file():
        raise SystemExit(f"skipped packing: {file} is missing; name GSM8K's folder with --gsm8k")
    rows = [json.loads(line) for line in file.read_text().splitlines()[: arguments.prompts]]
    tokenizer = load_tokenizer(resolve_model(arguments.model))
    prompts = render_prompts(tokenizer, [[{"role": "user", "content": row["question"]}] for row in rows])
    return [len(prompt) for prompt in prompts], [
        len(solution) for solution in render_completions(tokenizer, [row["answer"] for row in rows])
    ]


def groups_of(prompts: list[int], solutions: list[int], size: int) -> list[tuple[int, list[int]]]:
    """Each prompt with `size` lengths of solutions, drawn at random with a fixed seed."""
    draw = random.Random(0)
    return [(prompt, draw.choices(solutions, k=size)) for prompt in prompts]


def count(groups: list[tuple[int, list[int]]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Positions and attention pairs, real and computed, of both ways, over all updates."""
    totals = dict.fromkeys(("real", "rows", "pairs", "pairs_computed", "trl_real", "trl_rows", "trl_pairs"), 0)
    for first in range(0, len(groups), arguments.prompts_per_update):
        part = groups[first : first + arguments.prompts_per_update]
        for counted in (count_packed(part, arguments.micro_batch_tokens), count_padded(part, arguments.batch)):
            for name, value in counted.items():
                totals[name] += value
    return totals


def count_packed(groups: list[tuple[int, list[int]]], budget: int) -> dict[str, int]:
    """What the packed forward passes of one update compute."""
    from tuneloop.models.packed import pack
    from tuneloop.training.batching import micro_batches

    members = [([1] * prompt, [[1] * length for length in completions]) for prompt, completions in groups]
    counted = dict.fromkeys(("real", "rows", "pairs", "pairs_computed"), 0)
    for numbers in micro_batches(members, budget):
        batch = pack([members[n] for n in numbers])
        counted["rows"] += batch.input_ids_T.numel()
        for n in numbers:
            prompt, fed = groups[n][0], [length - 1 for length in groups[n][1]]  # the last token predicts nothing
            counted["real"] += prompt + sum(fed)
            counted["pairs"] += triangle(prompt) + sum(length * prompt + triangle(length) for length in fed)
        counted["pairs_computed"] += attention_pairs(batch)
    return counted


def attention_pairs(batch) -> int:
    """Pairs of query and key that attention multiplies, from the operations of one narrow head's forward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    width = 64  # wide enough that a column which some product carries along does not count
    heads = torch.zeros(batch.input_ids_T.numel(), 1, width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        batch.attend(0, heads, heads, heads, 1.0)
    return counter.get_total_flops() // (4 * width)  # a pair's product and its part of the sum, two operations a number


def count_padded(groups: list[tuple[int, list[int]]], size: int) -> dict[str, int]:
    """What padded batches of `size` completions compute: prompts and completions each as long as the longest."""
    sequences = [(prompt, length) for prompt, completions in groups for length in completions]
    counted = dict.fromkeys(("trl_real", "trl_rows", "trl_pairs"), 0)
    # TRL pads the prompts and completions of a whole generation batch alike, then cuts it into micro-batches.
    width = max(prompt for prompt, _ in sequences) + max(length for _, length in sequences)
    for first in range(0, len(sequences), size):
        part = sequences[first : first + size]
        counted["trl_real"] += sum(prompt + length for prompt, length in part)
        counted["trl_rows"] += len(part) * width
        counted["trl_pairs"] += len(part) * width * width
    return counted


def triangle(length: int) -> int:
    """Pairs of a causal sequence with itself."""
    return length * (length + 1) // 2


def rows_of(name: str, counted: dict[str, int], arguments: argparse.Namespace) -> list[Row]:
    """The table's lines of one kind of training."""
    ours, theirs = counted["real"] / counted["rows"], counted["trl_real"] / counted["trl_rows"]
    size = f"{arguments.group} completions a prompt" if name == "rl" else "one completion a prompt"
    return [
        Row(f"{name}: real share of the rows of linear layers ({size})", f"{ours:.1%}", f"{theirs:.1%} padded",
            ours / theirs, f"at least {TARGET:.0%} asked; 100 % possible"),
        Row(f"{name}: rows of linear layers, in all", f"{counted['rows']:,}", f"{counted['trl_rows']:,} padded",
            counted["trl_rows"] / counted["rows"], "more is better; prompts shared within a group"),
        Row(f"{name}: real share of computed attention pairs", f"{counted['pairs'] / counted['pairs_computed']:.1%}",
            f"{counted['pairs_computed']:,} pairs against {counted['trl_pairs']:,} padded",
            counted["trl_pairs"] / counted["pairs_computed"], "50 %: causal squares without padding"),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
