"""LoRA reinforcement learning: prepared data and a warmed-up adapter in, the candidate adapter out."""

import json
import tempfile
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import RunConfig
from components.runner import Maker, Step, Summary
from tuneloop.errors import UserError

if TYPE_CHECKING:
    from components.lora_rl.training import Member
    from tuneloop.training.nodes import Nodes
    from tuneloop.training.rl import RlResult, RlTrainer


def maker(config: RunConfig) -> Maker | None:
    """What has the output made on other machines, when `lora_rl.distributed.launcher` says so."""
    if config.lora_rl.distributed.launcher == "inline":
        return None
    from components.lora_rl.trainjob.launcher import launch

    return launch


def run(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Summary:
    """Train the adapter by reinforcement learning from the task's rewards, in one process or in several."""
    from tuneloop.training.launch import process_count
    from tuneloop.training.nodes import Nodes

    distributed, nodes = config.lora_rl.distributed, Nodes.from_environment()
    count = process_count(distributed)
    if count * nodes.count == 1 and not distributed.offloads:
        return train(config, inputs, output)
    return _train_together(config, inputs, output, count, nodes)


def _train_together(config: RunConfig, inputs: Mapping[str, Path], output: Path, count: int, nodes: "Nodes") -> Summary:
    """`train` in `count` processes that are started here, and in as many on each of the other nodes."""
    from tuneloop.models.sources import resolve_model
    from tuneloop.training.launch import refuse_missing_deepspeed, run_processes

    refuse_missing_deepspeed()
    if config.lora_rl.rank_schedule.kind != "off":
        raise UserError("lora_rl.rank_schedule changes ranks in one process only, and there are to be "
                        f"{count * nodes.count}: set distributed.processes = 1, without offloading")  # fmt: skip
    if not (inputs["warmup"] / "model").is_dir():
        resolve_model(config.model.uri)  # fetched once, for all
    with tempfile.TemporaryDirectory(prefix="tuneloop-") as folder:
        request = Path(folder) / "request.json"
        paths = {name: str(path.resolve()) for name, path in inputs.items()}
        wanted = {"config": config.model_dump(mode="json"), "inputs": paths, "output": str(output.resolve())}
        request.write_text(json.dumps(wanted))
        command = ["-m", "components.lora_rl.process", str(request)]
        outcomes = run_processes(command, count, config.lora_rl.stop_grace_seconds, nodes)
    memory = max(outcome.peak_rss_bytes for outcome in outcomes)
    return {**outcomes[0].summary, "processes": count * nodes.count, "peak_rss_bytes_of_a_process": memory}


def train(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Summary:
    """This process's part of the training: all of it when it is alone."""
    from components.lora_rl.training import load_base, make_trainer, read_member

    member = read_member(config, inputs, output)
    base = load_base([member])
    with closing(base.engine):
        trainer = make_trainer(member, base)
        result = trainer.run()
    return leave(member, trainer, result)


def leave(member: "Member", trainer: "RlTrainer", result: "RlResult") -> Summary:
    """Write what was trained into the member's output; returns the step's summary."""
    from tuneloop.models.adapter_io import Adapter, save_adapter
    from tuneloop.training.finish import save_full_model

    policy, is_full = trainer.policy, member.settings.mode == "full"
    trained = None if is_full else policy.adapter()
    if not trainer.world.is_first:
        return {}
    if trained is None:
        save_full_model(policy.model, member.folder, member.output / "model")
    else:
        named = {**trained.config, "base_model_name_or_path": member.base_uri}
        save_adapter(Adapter(trained.factors, named), member.output / "adapter")
    return _record(result, member)


def _record(result: "RlResult", member: "Member") -> Summary:
    """Write `rl.json`; returns the step's summary."""
    settings = member.settings
    first, last = result.first_accuracy, result.last_accuracy
    digest = "model_digest" if settings.mode == "full" else "adapter_digest"
    record = {
        "mode": settings.mode,
        "updates": result.updates,
        "learning_rate": settings.optimizer.learning_rate,
        digest: result.adapter_digest,
        "reference_digest": result.reference_digest,
        "validation_accuracy": {"first": first, "last": last},
        "base_uri": member.base_uri,
    }
    (member.output / "rl.json").write_text(json.dumps(record, indent=2) + "\n")
    return {
        "updates": result.updates,
        "validation_accuracy_first": first,
        "validation_accuracy_last": last,
        digest: result.adapter_digest,
    }


STEP = Step(
    "lora_rl",
    ("data", "warmup"),
    run,
    sections=("model", "task", "lora", "lora_rl"),
    resumable=True,
    maker=maker,
    indifferent=("lora_rl.distributed", "lora_rl.gradient_checkpointing", "lora_rl.stop_grace_seconds"),
)
