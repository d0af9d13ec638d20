"""Merging against copying: memory and time of folding an adapter into a synthetic 2 GB model.

    python benchmarks/merge.py

Every measurement is a fresh process, so that its peak memory is its own. Copies and merges take turns, read the same
files from the page cache, and both bring every file they write to the disk before the clock stops.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
SHARD_BYTES = 256_000_000
ROUNDS = 5
HIDDEN, LAYERS, HEADS, KV_HEADS, INTERMEDIATE, VOCAB, RANK = 2048, 22, 32, 4, 5632, 32_000, 32  # a 1.1B Llama


def main() -> None:
    """Make the model, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hardware", default="2-core-avx512", help="part of the result's file name")
    parser.add_argument("--scratch", help="a folder with 5 GB of room; default: the system's temporary folder")
    parser.add_argument("--child", nargs=4, metavar=("WHAT", "MODEL", "ADAPTER", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, *folders = arguments.child
        print(json.dumps(measure(what, *map(Path, folders))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        result = compare(Path(scratch))
    path = REPOSITORY / "benchmarks" / "results" / f"{date.today()}-{arguments.hardware}-merge.json"
    path.write_text(json.dumps({"hardware": arguments.hardware, **result}, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    print(f"saved {path.relative_to(REPOSITORY)}")


def compare(scratch: Path) -> dict[str, Any]:
    """Copies and merges in turns, `ROUNDS` of each."""
    model, adapter = scratch / "model", scratch / "adapter"
    run_child("make", model, adapter, scratch / "unused")
    rows: dict[str, list[dict[str, Any]]] = {"copy": [], "merge": []}
    for _ in range(ROUNDS):
        for what in rows:
            rows[what].append(run_child(what, model, adapter, scratch / "output"))
            shutil.rmtree(scratch / "output")
    seconds = {what: statistics.median(row["seconds"] for row in measured) for what, measured in rows.items()}
    best = {what: min(row["seconds"] for row in measured) for what, measured in rows.items()}
    return {
        "model_bytes": sum(file.stat().st_size for file in model.glob("*.safetensors")),
        "shard_bytes": SHARD_BYTES,
        "rank": RANK,
        "threads": rows["merge"][0]["threads"],
        "copy_seconds": seconds["copy"],
        "merge_seconds": seconds["merge"],
        "merge_over_copy": round(seconds["merge"] / seconds["copy"], 3),
        "best_merge_over_best_copy": round(best["merge"] / best["copy"], 3),
        "merge_peak_rss_bytes": max(row["peak_rss_bytes"] for row in rows["merge"]),
        "rss_before_merge_bytes": max(row["rss_before_bytes"] for row in rows["merge"]),
        "merged": rows["merge"][0]["merged"],
        "rounds": rows,
    }


def run_child(what: str, *folders: Path) -> dict[str, Any]:
    """Measure `what` in a process of its own."""
    command = [sys.executable, __file__, "--child", what, *map(str, folders)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(what: str, model: Path, adapter: Path, output: Path) -> dict[str, Any]:
    """In the child: do it, and report the time and the process's peak memory."""
    action = {"make": make, "copy": copy, "merge": merge}[what]
    if what == "merge":
        import tuneloop.models.merge  # noqa: F401 the clock starts after the imports
    before = _status_bytes("VmRSS")
    started = time.perf_counter()
    details = action(model, adapter, output)
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 3),
        "peak_rss_bytes": _status_bytes("VmHWM"),
        "rss_before_bytes": before,
    } | details


def copy(model: Path, adapter: Path, output: Path) -> dict[str, Any]:
    """Copy every file, each brought to the disk."""
    output.mkdir()
    for source in sorted(model.iterdir()):
        target = output / source.name
        shutil.copyfile(source, target)
        for path in (target, output):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return {}


def merge(model: Path, adapter: Path, output: Path) -> dict[str, Any]:
    """Merge with the library's own function."""
    import torch

    from tuneloop.models.merge import merge_adapter

    merged = merge_adapter(model, adapter, output, max_shard_bytes=SHARD_BYTES)
    return {"threads": torch.get_num_threads(), "merged": merged.__dict__}


def make(model: Path, adapter: Path, output: Path) -> dict[str, Any]:
    """A Llama of 1.1B random bf16 weights, and an adapter on all its linear layers."""
    import torch

    from tuneloop.models.adapter_io import Adapter, save_adapter
    from tuneloop.models.safetensors_shards import ShardWriter, TensorSpec, plan_shards, shard_names, write_index
    from tuneloop.models.tiny import byte_tokenizer

    model.mkdir()
    generator = torch.Generator().manual_seed(0)
    linear = linear_shapes()
    norms = [
        f"model.layers.{layer}.{name}_layernorm" for layer in range(LAYERS) for name in ("input", "post_attention")
    ]
    shapes: dict[str, tuple[int, ...]] = {f"{module}.weight": shape for module, shape in linear.items()}
    shapes |= {f"{name}.weight": (HIDDEN,) for name in (*norms, "model.norm")}
    shapes |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    shards = plan_shards([TensorSpec(name, "BF16", shape) for name, shape in sorted(shapes.items())], SHARD_BYTES)
    for name, shard in zip(shard_names(len(shards)), shards, strict=True):
        writer = ShardWriter(model / name, shard)
        for spec in shard:
            writer.write(spec, 0, torch.randn(spec.shape, generator=generator).mul_(0.02).bfloat16())
        writer.finish()
    write_index(model, shards)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_size": HIDDEN,
              "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
              "intermediate_size": INTERMEDIATE, "vocab_size": VOCAB, "tie_word_embeddings": False}  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(model / "tokenizer.json"))
    factors = {
        module: (torch.randn(RANK, inner, generator=generator) / 32, torch.randn(outer, RANK, generator=generator) / 99)
        for module, (outer, inner) in linear.items()
    }
    leaves = sorted({module.rpartition(".")[2] for module in linear})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": leaves, "bias": "none"}
    save_adapter(Adapter(factors, settings), adapter)
    return {}


def linear_shapes() -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of the blocks."""
    narrow = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (narrow, HIDDEN),
        "self_attn.v_proj": (narrow, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    return {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key} line")


if __name__ == "__main__":
    main()
