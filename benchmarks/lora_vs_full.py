"""LoRA against full fine-tuning, both by reinforcement learning in the same engine, on the demo task.

    python -m benchmarks.lora_vs_full                        # about an hour on two cores
    python -m benchmarks.lora_vs_full --config configs/ci.toml --updates 2 --sweep 512:64     # a look in a minute

Both arms start from one warm-up (the full arm with its adapter added to the weights) and see the same prompts and
random numbers. Every run is a process of its own, and measures within it:

- held: what the trainer keeps between updates beside the base model's weights, tensor by tensor: fp32 masters, gradient
  sums and moments, the adapter, the reference if it is kept;
- activations: how far memory rises during an update, at its peak;
- trainer memory: the two together. The weights of the base are in both arms and in no figure;
- arithmetic: products of the linear layers, 2/3 + r/in + r/out of full fine-tuning's (2/3 + 2r/N for square ones);
- resident: the whole process's peak while it samples and updates, with weights, libraries and the engine's merged
  matrices (which the full arm does not need).

`--sweep` runs both arms at several settings, `tokens of a forward pass : sequences sampled at once`. Samples a second
within one budget are then the best of each arm among the settings whose resident peak stays within it; the budget is
the least that full fine-tuning runs in. The last runs train to the end, and compare validation accuracy.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY, MemoryWindow, Row, in_child, save, status_bytes

MODES = ("lora", "full")
BUDGETS = (1.0, 1.25, 1.5)  # of the least that full fine-tuning runs in


def main() -> None:
    """Prepare, run the sweep and the curves, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(REPOSITORY / "configs" / "demo.toml"))
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--updates", type=int, default=24, help="of the runs that are trained to the end")
    parser.add_argument("--sweep", nargs="+", default=["512:64", "2048:128", "8192:512"], metavar="TOKENS:SEQUENCES")
    parser.add_argument("--full-rate", type=float, default=0.0, help="learning rate of the full arm; 0: a tenth")
    parser.add_argument("--work", type=Path, help="folder for data and warm-up, kept for the next time")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "REQUEST"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, request = arguments.child
        print(json.dumps({"prepare": prepare, "train": train}[what](json.loads(request))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).resolve()
        request = {"config": arguments.config, "set": arguments.set, "work": str(work)}
        prepared = child("prepare", request)
        rate = arguments.full_rate or prepared["learning_rate"] / 10
        sweep = [run(request, mode, rate, Path(scratch), 3, s) for s in arguments.sweep for mode in MODES]
        curves = [run(request, mode, rate, Path(scratch), arguments.updates) for mode in MODES]
    rates = prepared["learning_rate"], rate
    rows = [*sweep_rows(sweep, prepared["arithmetic"]), *budget_rows(sweep), *curve_rows(curves, rates)]
    save("lora_vs_full", rows, {"full_rate": rate, "prepared": prepared, "sweep": sweep, "curves": curves})


def child(what: str, request: dict[str, Any]) -> dict[str, Any]:
    """Do it in a process of its own."""
    print(f"lora_vs_full: {what} {request.get('mode', '')} {request.get('setting', '')}", file=sys.stderr, flush=True)
    return in_child(Path(__file__), what, json.dumps(request))


def run(request: dict[str, Any], mode: str, rate: float, scratch: Path, updates: int, setting: str = "") -> dict:
    """One training, measured; validation only where it is trained to the end."""
    overrides = [f'lora_rl.mode="{mode}"', f"lora_rl.updates={updates}", "lora_rl.checkpoint_every=1000000"]
    if mode == "full":
        overrides.append(f"lora_rl.optimizer.learning_rate={rate}")
    if setting:
        tokens, sequences = setting.split(":")
        overrides += [f"lora_rl.micro_batch_tokens={tokens}", f"lora_rl.engine.max_sequences={sequences}"]
        overrides += ["lora_rl.validation_prompts=16", "lora_rl.validate_every=1000000"]
    output = scratch / f"{mode}-{setting.replace(':', '-') or 'curve'}"
    asked = {**request, "set": [*request["set"], *overrides], "mode": mode, "setting": setting, "output": str(output)}
    return {"mode": mode, "setting": setting, **child("train", asked)}


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: data and warm-up, unless they are there; what the arithmetic says of an update."""
    from components.check.model import check_model
    from components.config import load_run_config
    from components.data_prep.step import STEP as DATA_PREP
    from components.runner import execute
    from components.sft_warmup.step import STEP as SFT_WARMUP

    config, work = load_run_config(request["config"], tuple(request["set"])), request["work"]
    execute(DATA_PREP, config, {}, f"{work}/data_prep")
    execute(SFT_WARMUP, config, {"data": f"{work}/data_prep"}, f"{work}/sft_warmup")
    targets = check_model(config).targets.values()
    lora = sum(2 * rows * columns + 3 * rank * (rows + columns) for rows, columns, rank in targets)
    full = sum(3 * rows * columns for rows, columns, _ in targets)
    return {"learning_rate": config.lora_rl.optimizer.learning_rate, "arithmetic": lora / full}


def train(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: the lora_rl step, with a learner that measures."""
    import tuneloop.training.rl as rl
    from components.config import load_run_config
    from components.lora_rl.step import STEP

    config, work = load_run_config(request["config"], tuple(request["set"])), Path(request["work"])
    measured = measuring(rl.Learner)
    rl.Learner = measured  # type: ignore[misc]
    output = Path(request["output"])
    output.mkdir(parents=True)
    summary = STEP.run(config, {"data": work / "data_prep", "warmup": work / "sft_warmup"}, output)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timed = [row for row in rows if "seconds/update" in row][1:] or rows[-1:]  # the first one warms caches up
    phases = {
        name: min(row[f"seconds/{name}"] for row in timed if f"seconds/{name}" in row)
        for name in ("collect", "score", "update", "sync")
    }
    samples = config.lora_rl.prompts_per_update * config.lora_rl.group_size
    return {
        "seconds": phases,
        "samples_per_second": samples / sum(phases.values()),
        "held_bytes": measured.held,
        "activation_bytes": measured.rise,
        "trainer_bytes": measured.held + measured.rise,
        "resident_bytes": measured.resident,
        "accuracy": [summary["validation_accuracy_first"], summary["validation_accuracy_last"]],
        "rewards": [row["reward/mean"] for row in rows if "reward/mean" in row],
    }


def measuring(learner: type) -> Any:
    """The learner, with its memory measured by phase."""

    class Measured(learner):
        held = rise = resident = 0

        def score(self, rollout):
            Measured.resident = max(Measured.resident, status_bytes("VmHWM") if Measured.resident else 0)
            return self._watched(lambda: super(Measured, self).score(rollout))

        def update(self, minibatches):
            values = self._watched(lambda: super(Measured, self).update(minibatches))
            Measured.held = held_bytes(self)
            return values

        def _watched(self, action):
            with MemoryWindow() as window:
                result = action()
            Measured.rise = max(Measured.rise, window.rise)
            Measured.resident = max(Measured.resident, window.before + window.rise)
            return result

    return Measured


def held_bytes(learner: Any) -> int:
    """Bytes of the tensors that optimiser, adapter and reference hold, beside the base model's weights."""
    import torch

    trained = {id(parameter) for _, parameter in learner.policy.parameters()}
    base = {
        parameter.untyped_storage().data_ptr()
        for parameter in learner.policy.model.parameters()
        if not learner.policy.layers or id(parameter) not in trained
    }
    storages: dict[int, int] = {}
    seen: dict[int, Any] = {}  # the objects too: an id is free again when its object goes

    def visit(value: Any, depth: int = 0) -> None:
        if id(value) in seen or depth > 12:
            return
        seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.data_ptr() not in base:
                storages[storage.data_ptr()] = storage.nbytes()
            if value.is_leaf and value.grad is not None:
                visit(value.grad, depth + 1)
        elif isinstance(value, dict):
            for inner in value.values():
                visit(inner, depth + 1)
        elif isinstance(value, list | tuple):
            for inner in value:
                visit(inner, depth + 1)
        elif isinstance(value, torch.optim.Optimizer):
            visit([value.state, value.param_groups], depth + 1)
        elif type(value).__module__.startswith("tuneloop.training") and hasattr(value, "__dict__"):
            visit({name: inner for name, inner in vars(value).items() if name != "model"}, depth + 1)

    visit([learner.optimizer, learner.reference, [parameter for _, parameter in learner.policy.parameters()]])
    return sum(storages.values())


def sweep_rows(sweep: list[dict], arithmetic: float) -> list[Row]:
    """Memory and times of each setting."""
    rows = []
    for setting in dict.fromkeys(one["setting"] for one in sweep):
        lora, full = (next(o for o in sweep if o["setting"] == setting and o["mode"] == mode) for mode in MODES)
        kept = lora["trainer_bytes"] / full["trainer_bytes"]
        held = lora["held_bytes"] / full["held_bytes"]
        update = lora["seconds"]["update"] / full["seconds"]["update"]
        step = sum(lora["seconds"].values()) / sum(full["seconds"].values())
        rows += [
            Row(f"{setting}: trainer memory", size(lora["trainer_bytes"]), f"{size(full['trainer_bytes'])} full",
                kept, "at most 0.2 asked; activations are in both"),
            Row(f"{setting}: of it held between updates", size(lora["held_bytes"]), f"{size(full['held_bytes'])} full",
                held, "adapter / model parameters"),
            Row(f"{setting}: resident peak of the process", size(lora["resident_bytes"]),
                f"{size(full['resident_bytes'])} full", lora["resident_bytes"] / full["resident_bytes"], ""),
            Row(f"{setting}: time of the update phase", f"{lora['seconds']['update']:.2f} s",
                f"{full['seconds']['update']:.2f} s full", update, f"{arithmetic:.3f} by arithmetic"),
            Row(f"{setting}: time of the whole step", f"{sum(lora['seconds'].values()):.2f} s",
                f"{sum(full['seconds'].values()):.2f} s full", step, "sampling costs both the same"),
        ]  # fmt: skip
    return rows


def budget_rows(sweep: list[dict]) -> list[Row]:
    """Samples a second of each arm at its best setting within one budget of resident memory."""
    least = min(one["resident_bytes"] for one in sweep if one["mode"] == "full")
    rows = []
    for factor in BUDGETS:
        best = {
            mode: max(
                (o["samples_per_second"] for o in sweep if o["mode"] == mode and o["resident_bytes"] <= factor * least),
                default=0.0,
            )
            for mode in MODES
        }
        if best["full"]:
            rows.append(
                Row(f"samples/s within {size(factor * least)} ({factor:g} x the least of full)", f"{best['lora']:.1f}",
                    f"{best['full']:.1f} full", best["lora"] / best["full"], "at least 2 asked"))  # fmt: skip
    return rows


def curve_rows(curves: list[dict], rates: tuple[float, float]) -> list[Row]:
    """Final accuracy of both arms, each at the learning rate that is named."""
    lora, full = (next(one for one in curves if one["mode"] == mode) for mode in MODES)
    ratio = lora["accuracy"][1] / full["accuracy"][1] if full["accuracy"][1] else None
    what = f"validation accuracy after training, one seed, rates {rates[0]:g} and {rates[1]:g}"
    ours, theirs = (f"{one['accuracy'][1]:.1%} from {one['accuracy'][0]:.1%}" for one in (lora, full))
    return [Row(what, ours, f"{theirs} full", ratio, "at least 1 asked")]


def size(count: float) -> str:
    """Bytes in decimal units."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
