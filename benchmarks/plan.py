"""Planned peak memory against what the steps really take: `python benchmarks/plan.py`.

For each configuration the real steps sft_warmup and lora_rl run as processes of their own, and the peak that each left
in its step.json is compared with what `tuneloop.plan` says from the config alone. Prompts are all equally long, and
rewards are spread by chance, so that no group is skipped. On a machine with a GPU the peak is the GPU's.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY, Row, in_child, save

SMOL = "bundled://smollm2-135m-instruct"
WIDE = "tiny://qwen2?hidden_size=512&layers=8&heads=8&kv_heads=2&intermediate_size=1536&max_position=2048"
BIG = "tiny://qwen2?hidden_size=1024&layers=20&heads=16&kv_heads=4&intermediate_size=4096&max_position=2048&dtype=bfloat16"
WORDS = ("the", "sun", "moon", "river", "stone", "house", "garden", "light", "story", "wind", "water", "small", "old")
SAID = 40  # words of what the warm-up imitates
TOLERANCE = 0.10


@dataclass(frozen=True)
class Setting:
    """One configuration; `words` make a prompt, and `SAID` words what the warm-up imitates."""

    name: str
    uri: str
    dtype: str
    rank: int
    words: int
    new_tokens: int
    micro_batch_tokens: int
    prompts: int = 8
    group: int = 4
    mode: str = "lora"
    minibatches: int = 1
    updates: int = 4
    checkpointing: bool = False


SETTINGS = (
    Setting("SmolLM2-135M, bf16, rank 32", SMOL, "bfloat16", 32, 60, 16, 1024),
    Setting("SmolLM2-135M, bf16, rank 8, longer completions", SMOL, "bfloat16", 8, 30, 48, 768, prompts=6),
    Setting(
        "SmolLM2-135M, bf16, rank 64, two minibatches", SMOL, "bfloat16", 64, 60, 8, 1536, prompts=16, minibatches=2
    ),
    Setting("SmolLM2-135M, fp32, rank 16", SMOL, "float32", 16, 40, 8, 512),
    Setting("SmolLM2-135M, bf16, full warm-up", SMOL, "bfloat16", 16, 40, 8, 512, mode="full", updates=2),
    Setting("25M, fp32, rank 32", WIDE, "float32", 32, 40, 32, 2048),
    Setting("300M, bf16, rank 32", BIG, "bfloat16", 32, 20, 16, 768, prompts=6),
    Setting("300M, bf16, rank 16, gradient checkpointing", BIG, "bfloat16", 16, 20, 16, 1536, checkpointing=True),
)


def spread_reward(completion: str, answer: str, metadata: dict[str, Any]) -> float:
    """A number in [0, 1) that follows from the completion by chance."""
    return int.from_bytes(sha256(completion.encode()).digest()[:4], "big") / 2**32


def main() -> None:
    """Measure, compare, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", type=int, default=[], metavar="N", help="configurations by their number")
    parser.add_argument("--child", nargs=4, metavar=("STEP", "CONFIG", "INPUTS", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return
    chosen = [SETTINGS[number] for number in arguments.only] or SETTINGS
    with tempfile.TemporaryDirectory() as scratch:
        measured = [
            record for number, setting in enumerate(chosen) for record in compare(setting, Path(scratch) / str(number))
        ]
    rows = [
        Row(
            f"{record['setting']}: {record['step']}, peak memory",
            f"planned {record['planned_bytes'] / 1e9:.2f} GB",
            f"measured {record['measured_bytes'] / 1e9:.2f} GB",
            record["planned_bytes"] / record["measured_bytes"],
            f"1 ± {TOLERANCE}, asked for",
        )
        for record in measured
    ]
    off = [abs(record["planned_bytes"] / record["measured_bytes"] - 1) for record in measured]
    save("plan", rows, {"within_tolerance": sum(o <= TOLERANCE for o in off), "of": len(off), "measured": measured})


def compare(setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """Both training steps of one configuration: planned and measured bytes."""
    from components.check.plan_inputs import plan_inputs
    from components.config import load_run_config

    folder.mkdir()
    config = write_config(setting, folder, longest=512)
    run_step("data_prep", config, folder)
    lengths = json.loads((folder / "data_prep" / "data_card.json").read_text())["lengths"]
    longest = lengths["prompt_tokens"]["max"], lengths["completion_tokens"]["max"]
    config = write_config(setting, folder, *longest)
    inputs = plan_inputs(load_run_config(config))
    environment = {"TUNELOOP_CACHE": str(folder / "cache")}
    make_model(setting.uri, environment)
    records = []
    for step, needs in (
        ("sft_warmup", {"data": "data_prep"}),
        ("lora_rl", {"data": "data_prep", "warmup": "sft_warmup"}),
    ):
        paths = {name: str(folder / made) for name, made in needs.items()}
        found = in_child(
            Path(__file__), step, str(config), json.dumps(paths), str(folder / step), environment=environment
        )
        phases = planned(inputs, step, found["gpu"])
        total = max(sum(items.values()) for items in phases.values())
        records.append({"setting": setting.name, "step": step, "planned_bytes": total, **found, "phases": phases})
        taken = found["measured_bytes"]
        print(f"{setting.name}: {step}: planned {total / 1e6:,.0f} MB, measured {taken / 1e6:,.0f} MB, "
              f"{total / taken - 1:+.1%}", flush=True)  # fmt: skip
    return records


def planned(inputs, step: str, gpu: str) -> dict[str, dict[str, int]]:
    """What the plan says of a step's phases, on the CPU or on one GPU."""
    from tuneloop.plan.devices import Device
    from tuneloop.plan.lora_rl import plan_lora_rl
    from tuneloop.plan.memory import plan_sft

    device = Device(gpu or "cpu", 1, 1.0, 1.0, 1.0, 1.0)  # how large and fast it is does not matter here
    memory = plan_sft(inputs, device) if step == "sft_warmup" else plan_lora_rl(inputs, device)
    return {phase.name: phase.device if gpu else phase.host for phase in memory.phases}


def measure(step: str, config: str, inputs: str, output: str) -> dict[str, Any]:
    """In the child: run the step as its command line does; the peak is the process's, or the GPU's if there is one."""
    from importlib import import_module

    from components.config import load_run_config
    from components.runner import execute

    result = execute(import_module(f"components.{step}.step").STEP, load_run_config(config), json.loads(inputs), output)
    torch = sys.modules["torch"]
    if not torch.cuda.is_available():
        return {"measured_bytes": result.peak_rss_bytes, "gpu": ""}
    free, total = torch.cuda.mem_get_info()
    outside = total - free - torch.cuda.memory_reserved()  # the context, and what others hold
    reserved = torch.cuda.max_memory_reserved() + outside
    return {"measured_bytes": reserved, "gpu": torch.cuda.get_device_name(), "host_bytes": result.peak_rss_bytes}


def make_model(uri: str, environment: dict[str, str]) -> None:
    """Put the model where the steps find it: making a random one takes more memory than training it."""
    code = "import sys; from tuneloop.models.sources import resolve_model; resolve_model(sys.argv[1])"
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    subprocess.run([sys.executable, "-c", code, uri], cwd=REPOSITORY, env=variables, check=True)


def run_step(step: str, config: Path, folder: Path) -> None:
    """A step that is not measured."""
    command = [sys.executable, "-m", f"components.{step}", "--config", str(config), "--output", str(folder / step)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, check=True)


def write_config(setting: Setting, folder: Path, longest: int, example: int = 512) -> Path:
    """The run's TOML, and the data that it names."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    rows = [{"prompt": text(setting.words), "answer": "none", "completion": text(SAID)} for _ in range(300)]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "config.toml"
    sequence = longest + max(example, setting.new_tokens)
    path.write_text(
        f"""
name = "plan"
model = {{ uri = "{setting.uri}", dtype = "{setting.dtype}", max_length = {sequence} }}
lora = {{ rank = {setting.rank}, alpha = {setting.rank}.0 }}
[task]
max_new_tokens = {setting.new_tokens}
rewards = [{{ kind = "python", name = "spread", function = "benchmarks.plan:spread_reward" }}]
[data_prep]
max_prompt_tokens = {longest}
max_completion_tokens = {example}
near_duplicates.enabled = false
sources = [{{ kind = "jsonl", uri = "{data}", completion_column = "completion" }}]
[sft_warmup]
mode = "{setting.mode}"
updates = {setting.updates}
examples_per_update = 16
micro_batch_tokens = {setting.micro_batch_tokens}
validation_examples = 8
[lora_rl]
updates = {setting.updates}
prompts_per_update = {setting.prompts}
group_size = {setting.group}
micro_batch_tokens = {setting.micro_batch_tokens}
validation_prompts = 8
kept_prompts = 1
gradient_checkpointing = {str(setting.checkpointing).lower()}
algorithm.minibatches = {setting.minibatches}
engine.canary_tolerance = 100.0
"""
    )
    return path


if __name__ == "__main__":
    main()
