"""Four adapters trained together over one base against four runs of their own: memory and time.

    python -m benchmarks.joint                 # SmolLM2-135M, ranks 8, 16, 32 and 64

The same configs are run by `python -m components.lora_rl`, one after the other, and by `components.lora_rl.joint`; the
adapters must come out equal, bit for bit. Memory is the peak of the process: its resident set, and of that what is not
file pages (libraries), which processes side by side would share.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY, Row, in_child, save, seconds_of
from tuneloop.memory import TRAINING_ENVIRONMENT

RANKS = (8, 16, 32, 64)
ALLOWED = 0.4  # of the four runs' memory
CONFIG = REPOSITORY / "configs" / "demo.toml"
# KL in the loss, so that every group is trained on, whatever the rewards of a model that was not warmed up;
# to it the canary's completions are improbable, so that bfloat16 tells more on them.
SETTINGS = (
    "sft_warmup.updates=0", "lora_rl.updates=2", "lora_rl.prompts_per_update=32",
    "lora_rl.group_size=8", "lora_rl.algorithm.minibatches=1", "lora_rl.algorithm.kl_coefficient=0.01",
    "lora_rl.engine.canary_tolerance=0.5", "lora_rl.validate_every=100", "lora_rl.validation_prompts=32",
)  # fmt: skip


def main() -> None:
    """Prepare, measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled://smollm2-135m-instruct")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(merge_seconds(*arguments.child)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(arguments.model, Path(scratch))


def compare(model: str, scratch: Path) -> None:
    """Both ways, and what one merge costs."""
    config = tomllib.loads(CONFIG.read_text())
    config["data_prep"]["sources"][0]["size"] = 600
    (scratch / "config.json").write_text(json.dumps(config))
    members = {f"rank-{rank}": settings(model, rank) for rank in RANKS}
    run(scratch, "data_prep", settings(model, RANKS[0]), "--output", "data")
    for name, wanted in members.items():
        run(scratch, "sft_warmup", wanted, "--data", "data", "--output", f"{name}-warmup")
    apart = {
        name: run(scratch, "lora_rl", wanted, *inputs(name), "--output", f"{name}-apart")
        for name, wanted in members.items()
    }
    # One process, so one list of overrides: each member's config is the resolved one that its own run has left.
    arguments: list[str] = []
    for name in members:
        config = str(scratch / f"{name}-apart" / "config.json")
        arguments += ["--config", config, *inputs(name), "--output", f"{name}-joint"]
    together = measured(scratch, ["components.lora_rl.joint", *arguments])
    for name in members:
        records = [(scratch / f"{name}-{way}" / "rl.json").read_bytes() for way in ("apart", "joint")]
        assert records[0] == records[1], f"{name}: the joint training made another adapter"
    report(model, apart, together, scratch)


def report(model: str, apart: dict[str, dict[str, float]], together: dict[str, float], scratch: Path) -> None:
    """The table and the file."""
    sums = {key: sum(one[key] for one in apart.values()) for key in together}
    merges = in_child(Path(__file__), model, str(scratch))
    asked = f"{ALLOWED} (asked for)"

    def memory(key: str) -> tuple[str, str, float]:
        return f"{together[key] / 1e6:,.0f} MB", f"{sums[key] / 1e6:,.0f} MB", together[key] / sums[key]

    labels = f"{len(RANKS)} adapters, ranks {', '.join(map(str, RANKS))}, together over apart"
    rows = [
        Row(f"peak resident memory, {labels}", *memory("rss"), asked),
        Row(f"of that, without file pages, {labels}", *memory("anonymous"), asked),
        Row(
            f"time of {labels}",
            f"{together['seconds']:.1f} s", f"{sums['seconds']:.1f} s", together["seconds"] / sums["seconds"],
            "updates are made in turns: what is saved is starting and loading",
        ),
    ]  # fmt: skip
    save("joint", rows, {"model": model, "apart": apart, "together": together, "merge_seconds": merges})


def settings(model: str, rank: int) -> list[str]:
    """The overrides that make a member."""
    own = [f"name=rank-{rank}", f"lora.rank={rank}", f"lora.alpha={float(rank)}", f"seed={rank}"]
    return [part for value in (*SETTINGS, f"model.uri={json.dumps(model)}", *own) for part in ("--set", value)]


def inputs(name: str) -> list[str]:
    """A member's inputs."""
    return ["--data", "data", "--warmup", f"{name}-warmup"]


def run(scratch: Path, step: str, overrides: list[str], *arguments: str) -> dict[str, float]:
    """One step in a process of its own; what it took."""
    return measured(scratch, [f"components.{step}", "--config", "config.json", *overrides, *arguments])


def measured(scratch: Path, module: list[str]) -> dict[str, float]:
    """Run `python -m module…` in the scratch folder; its seconds and its peaks in bytes, looked at every 5 ms."""
    environment = {**os.environ, **TRAINING_ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", *module], cwd=scratch, env=environment, stdout=subprocess.DEVNULL)
    peaks = {"rss": 0.0, "anonymous": 0.0}
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        if "VmHWM" in lines:  # a process that has ended has no memory
            peaks["rss"] = float(lines["VmHWM"].split()[0]) * 1024
            anonymous = sum(float(lines[key].split()[0]) for key in ("RssAnon", "RssShmem")) * 1024
            peaks["anonymous"] = max(peaks["anonymous"], anonymous)
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{' '.join(module)}: ended with {process.returncode}")
    return {"seconds": round(time.perf_counter() - started, 2), **peaks}


def merge_seconds(model: str, scratch: str) -> dict[str, Any]:
    """In a child: the time of giving the engine an adapter of each rank, what a change of members costs."""
    from tuneloop.models.adapter_io import load_adapter
    from tuneloop.models.load import load_model, load_tokenizer
    from tuneloop.models.sources import resolve_model
    from tuneloop.rollout.torch_engine import TorchEngine

    folder = resolve_model(model)
    engine = TorchEngine.sharing(load_model(folder, "bfloat16"), load_tokenizer(folder))
    adapters = {rank: load_adapter(Path(scratch) / f"rank-{rank}-joint" / "adapter") for rank in RANKS}
    return {str(rank): round(seconds_of(lambda a=a: engine.sync(a)), 4) for rank, a in adapters.items()}


if __name__ == "__main__":
    main()
