"""LoRA reinforcement learning: prepared data and a warmed-up adapter in, the candidate adapter out."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from components.config import RunConfig
from components.lora_rl.config import LoraRlConfig
from components.lora_rl.warmup import read_warmup
from components.runner import Step, Summary
from tuneloop.errors import UserError

if TYPE_CHECKING:
    from tuneloop.training.rl import RlResult

# Nats a token between two right computations: bfloat16 gives about 0.04, float32 about 1e-6.
CANARY_TOLERANCES = {"bfloat16": 0.1, "float32": 1e-3}
CANARIES = 16  # fixed prompts whose tokens trainer and engine must agree on after every sync


def run(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Summary:
    """Train the adapter by reinforcement learning from the task's rewards, in one process or in several."""
    from tuneloop.training.launch import process_count

    distributed = config.lora_rl.distributed
    count = process_count(distributed)
    if count == 1 and not distributed.offloads:
        return train(config, inputs, output)
    return _train_together(config, inputs, output, count)


def _train_together(config: RunConfig, inputs: Mapping[str, Path], output: Path, count: int) -> Summary:
    """`train` in `count` processes that are started here."""
    from tuneloop.models.sources import resolve_model
    from tuneloop.training.launch import refuse_missing_deepspeed, run_processes

    refuse_missing_deepspeed()
    if config.lora_rl.rank_schedule.kind != "off":
        raise UserError("lora_rl.rank_schedule changes ranks in one process only, and there are to be "
                        f"{count}: set lora_rl.distributed.processes = 1, without offloading")  # fmt: skip
    if not (inputs["warmup"] / "model").is_dir():
        resolve_model(config.model.uri)  # fetched once, for all
    with tempfile.TemporaryDirectory(prefix="tuneloop-") as folder:
        request = Path(folder) / "request.json"
        paths = {name: str(path.resolve()) for name, path in inputs.items()}
        wanted = {"config": config.model_dump(mode="json"), "inputs": paths, "output": str(output.resolve())}
        request.write_text(json.dumps(wanted))
        command = ["-m", "components.lora_rl.process", str(request)]
        outcomes = run_processes(command, count, config.lora_rl.stop_grace_seconds)
    memory = max(outcome.peak_rss_bytes for outcome in outcomes)
    return {**outcomes[0].summary, "processes": count, "peak_rss_bytes_of_a_process": memory}


def train(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Summary:
    """This process's part of the training: all of it when it is alone."""
    from tuneloop.data.chat import render_completion, render_prompt, require_chat_template
    from tuneloop.data.reader import read_examples
    from tuneloop.models.adapter_io import Adapter, save_adapter
    from tuneloop.models.load import checkpoint_layers, load_model, load_tokenizer, reserve_model
    from tuneloop.models.sources import resolve_model
    from tuneloop.rewards.base import build_scorer
    from tuneloop.rollout.shared_weights import SharedWeights
    from tuneloop.rollout.torch_engine import TorchEngine
    from tuneloop.rollout.weight_sync import Canary, WeightSync
    from tuneloop.training.finish import save_full_model
    from tuneloop.training.rl import RlTask, RlTrainer
    from tuneloop.training.world import World

    warmup = read_warmup(config, inputs["warmup"])
    settings = warmup.config.lora_rl
    scorer = build_scorer(config.task.rewards)
    train = read_examples(inputs["data"] / "train.parquet")
    validation = read_examples(inputs["data"] / "validation.parquet", settings.validation_prompts)
    base = warmup.model or resolve_model(config.model.uri)
    tokenizer = load_tokenizer(base)
    require_chat_template(tokenizer)
    world, distributed = World(), settings.distributed
    is_spread = world.together and distributed.zero_stage == 3
    if is_spread:  # the first process gives the others their share, a parameter at a time
        model = (
            load_model(base, config.model.dtype, "cpu") if world.is_first else reserve_model(base, config.model.dtype)
        )
    else:
        model = load_model(base, config.model.dtype)
    if settings.gradient_checkpointing:
        checkpoint_layers(model)
    policy = warmup.policy(model)
    if is_spread:  # its weights cannot be shared
        engine = TorchEngine(base, dtype=config.model.dtype, max_sequences=settings.engine.max_sequences)
    else:
        engine = TorchEngine.sharing(model, tokenizer, settings.engine.max_sequences)
    canaries = [
        Canary(render_prompt(tokenizer, example.messages), render_completion(tokenizer, example.completion))
        for example in validation[:CANARIES]
    ]
    tolerance = settings.engine.canary_tolerance or CANARY_TOLERANCES[config.model.dtype]
    sync: WeightSync
    if settings.mode == "full":
        sync = SharedWeights(engine, model, canaries, tolerance)
    else:
        sync = WeightSync(
            engine,
            model,
            policy.layers,
            policy.adapter_config,
            canaries,
            tolerance,
            layered=distributed.layered_summon,
        )
    task = RlTask(tokenizer, scorer, train, validation, config.task.max_new_tokens)
    result = RlTrainer(policy, sync, task, settings, seed=config.seed, folder=output).run()
    base_uri = str(base.resolve()) if warmup.model else config.model.uri
    trained = None if settings.mode == "full" else policy.adapter()
    if not world.is_first:
        return {}
    if trained is None:
        save_full_model(model, base, output / "model")
    else:
        named = {**trained.config, "base_model_name_or_path": base_uri}
        save_adapter(Adapter(trained.factors, named), output / "adapter")
    return _record(result, settings, base_uri, output)


def _record(result: "RlResult", settings: LoraRlConfig, base_uri: str, output: Path) -> Summary:
    """Write `rl.json`; returns the step's summary."""
    first, last = result.first_accuracy, result.last_accuracy
    digest = "model_digest" if settings.mode == "full" else "adapter_digest"
    record = {
        "mode": settings.mode,
        "updates": result.updates,
        "learning_rate": settings.optimizer.learning_rate,
        digest: result.adapter_digest,
        "reference_digest": result.reference_digest,
        "validation_accuracy": {"first": first, "last": last},
        "base_uri": base_uri,
    }
    (output / "rl.json").write_text(json.dumps(record, indent=2) + "\n")
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
    indifferent=("lora_rl.distributed", "lora_rl.gradient_checkpointing"),
)
