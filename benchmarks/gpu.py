"""GRPO on one GPU: our update against TRL's, decoding against its floor, the memory of LoRA against full fine-tuning.

    python -m benchmarks.gpu                                   # Qwen2.5-0.5B's shape, 32 prompts x 8 x 128 new tokens
    python -m benchmarks.gpu --shape tiny --prompts 2 --group 2 --new-tokens 8 --prompt-tokens 12    # a look, on a CPU

Needs torch, transformers, peft and trl beside this repository, and no download: `--shape` makes a model of random
weights, which cost what trained ones cost; `--model` names a real one. Each arm is a process of its own and gets the
same prompts; no completion ends before the limit, so all do the same work. Rewards alternate, so every group teaches.

- step: sample, score, update, sync; update: gradients and the optimiser's step. Seconds, best of `--steps` after a
  first one that warms up. TRL runs without gradient checkpointing, in the largest micro-batch that is asked for
  (`--trl-batch`), without vLLM; ours in `--micro-batch-tokens`.
- memory: the peak above what the process held before the update (gradients, activations), plus what optimiser and
  adapter hold between updates.
- decoding's floor is the time to read the weights once a step and each sequence's keys and values, at the rate at
  which this device copies memory.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import MemoryWindow, Row, in_child, matmul_rate, read_rate, save, tensor_bytes
from benchmarks.workload import SHAPES, model_folder

ARMS = ("lora", "full", "trl", "transformers")


def main() -> None:
    """Measure every arm, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--model", default="", help="a model's folder or URI in place of --shape")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--trl-batch", type=int, default=64, help="completions of one of TRL's forward passes")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--child", nargs=2, metavar=("ARM", "REQUEST"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        arm, text = arguments.child
        print(json.dumps(CHILDREN[arm](argparse.Namespace(**json.loads(text)))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        request = json.dumps({**vars(arguments), "child": None, "scratch": scratch})
        measured = {}
        for arm in ("machine", *arguments.arms):
            print(f"gpu: {arm}", file=sys.stderr, flush=True)
            measured[arm] = in_child(Path(__file__), arm, request)
    settings = {name: value for name, value in vars(arguments).items() if name != "child"}
    save("gpu", rows_of(measured, arguments), {"settings": settings, "measured": measured})


def machine(request: argparse.Namespace) -> dict[str, Any]:
    """In the child: make the model once; what the device copies and multiplies."""
    import torch

    model_folder(request.model or request.shape, Path(request.scratch))
    return {"torch": torch.__version__, "copy_bytes_per_second": read_rate(), "matmul_flops": matmul_rate()}


def prompt_texts(request: argparse.Namespace) -> list[str]:
    """Prompts of random letters: one token a letter for the random models' tokenizer."""
    import random

    draw = random.Random(0)
    return ["".join(draw.choices("abcdefghij", k=request.prompt_tokens)) for _ in range(request.prompts)]


def synchronized() -> float:
    """The clock, when the device has done all that it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(request: argparse.Namespace, mode: str) -> dict[str, Any]:
    """In the child: our collect, score, update and sync, with LoRA or of every weight."""
    from tuneloop.models.load import load_model, load_tokenizer
    from tuneloop.models.lora import attach, peft_config
    from tuneloop.rollout.torch_engine import TorchEngine
    from tuneloop.settings import LoraSettings
    from tuneloop.training.learner import Learner
    from tuneloop.training.policy import FullPolicy, Policy
    from tuneloop.training.settings import RlSettings
    from tuneloop.world import World

    folder = model_folder(request.model or request.shape, Path(request.scratch))
    model, tokenizer = load_model(folder, "bfloat16"), load_tokenizer(folder)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if mode == "full":
        policy: Policy = FullPolicy(model)
    else:
        lora = LoraSettings(rank=request.rank, alpha=float(request.rank))
        layers = attach(model, lora, 0)
        policy = Policy(model, layers, peft_config(lora, layers, model, str(folder)))
    engine = TorchEngine.sharing(model, tokenizer, request.prompts * request.group)
    engine.end_ids = set()  # every completion is as long as it may be
    settings = RlSettings(
        mode=mode,  # type: ignore[arg-type]
        prompts_per_update=request.prompts,
        group_size=request.group,
        micro_batch_tokens=request.micro_batch_tokens,
        updates=request.steps + 1,
    )
    engine.sync(policy.adapter() if policy.layers else None)  # its merged matrices are no memory of the trainer
    adapter = sum(parameter.nbytes for layer in policy.layers.values() for parameter in (layer.A, layer.B))
    before = tensor_bytes() - adapter  # which the trainer holds too
    learner = Learner(policy, settings, World(), max_new_tokens=request.new_tokens)
    prompts = [tokenizer(text)["input_ids"] for text in prompt_texts(request)]
    steps = [one_step(engine, learner, policy, prompts, request, number) for number in range(request.steps + 1)]
    held = tensor_bytes() - before
    best = {name: min(step[name] for step in steps[1:]) for name in ("collect", "score", "update", "sync")}
    rise = max(step["rise"] for step in steps[1:])
    made = request.prompts * request.group * request.new_tokens
    return {
        "seconds": best,
        "step_seconds": min(sum(step[name] for name in best) for step in steps[1:]),
        "tokens_per_second": made / best["collect"],
        "weights_bytes": weights,
        "read_bytes": weights - looked_up_bytes(model),
        "cache_bytes_a_token": cache_bytes_a_token(model),
        "prompt_tokens": sum(map(len, prompts)) / len(prompts),
        "held_bytes": held,
        "update_rise_bytes": rise,
        "memory_bytes": held + rise,
        "decode": decode_alone(engine, prompts, request),
    }


def one_step(engine, learner, policy, prompts, request: argparse.Namespace, number: int) -> dict[str, float]:
    """Seconds of each phase of one update, and how far memory rose in it."""
    seconds = {}

    def timed(name: str, action: Callable[[], Any]) -> Any:
        started = synchronized()
        result = action()
        seconds[name] = synchronized() - started
        return result

    rollout = timed("collect", lambda: sample(engine, prompts, request, number))
    with MemoryWindow() as window:
        minibatches, _ = timed("score", lambda: learner.score(rollout))
        timed("update", lambda: learner.update(minibatches))
    timed("sync", lambda: engine.sync(policy.adapter() if policy.layers else None))
    return {**seconds, "rise": window.rise}


def sample(engine, prompts: list[list[int]], request: argparse.Namespace, number: int):
    """A rollout whose rewards alternate within each group."""
    from tuneloop.data.schema import Example
    from tuneloop.rewards.base import Score
    from tuneloop.rollout.engine import SampleStream
    from tuneloop.settings import SamplingSettings
    from tuneloop.training.collect import Rollout, RolloutGroup

    groups = engine.generate(
        prompts,
        samples=request.group,
        sampling=SamplingSettings(),
        max_new_tokens=request.new_tokens,
        stream=SampleStream(0, number + 1),
    )
    scores = [Score(float(k % 2), {}, "") for k in range(request.group)]
    example = Example(id="", messages=[], answer="", completion="")
    return Rollout(
        [
            RolloutGroup(example, prompt, completions, [""] * request.group, scores)
            for prompt, completions in zip(prompts, groups, strict=True)
        ]
    )


def decode_alone(engine, prompts: list[list[int]], request: argparse.Namespace) -> dict[str, float]:
    """Seconds of the decoding steps alone: one generation less the same one cut off after its first token."""
    import copy

    short = copy.copy(request)
    short.new_tokens = 1
    seconds = []
    for _ in range(2):
        started = synchronized()
        sample(engine, prompts, request, 99)
        middle = synchronized()
        sample(engine, prompts, short, 99)
        seconds.append((middle - started) - (synchronized() - middle))
    return {"seconds": min(seconds), "steps": request.new_tokens - 1}


def cache_bytes_a_token(model) -> int:
    """Keys and values of one token in bfloat16."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * width * 2


def trl_config(request: argparse.Namespace) -> Any:
    """TRL's settings; its passes divide the completions evenly, so that it makes as many as ours."""
    import torch
    from trl import GRPOConfig

    total = request.prompts * request.group
    batch = max(size for size in range(1, min(request.trl_batch, total) + 1) if total % size == 0)
    return GRPOConfig(
        output_dir=f"{request.scratch}/trl",
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=total // batch,
        num_generations=request.group,
        max_completion_length=request.new_tokens,
        generation_kwargs={"min_new_tokens": request.new_tokens},
        max_steps=request.steps + 1,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        beta=0.0,
        learning_rate=1e-4,
        gradient_checkpointing=False,
        temperature=1.0,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def trl(request: argparse.Namespace) -> dict[str, Any]:
    """In the child: TRL's GRPOTrainer on the same work."""
    import torch
    import trl.import_utils as import_utils
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    import_utils.is_vllm_available = lambda *_, **__: False  # one that is installed would only be imported
    from trl import GRPOTrainer

    folder = model_folder(request.model or request.shape, Path(request.scratch))
    log: dict[str, list[float]] = {"step": [], "generate": []}

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            started = synchronized()
            result = super()._generate_and_score_completions(inputs)
            log["generate"].append(synchronized() - started)
            return result

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.started = synchronized()

        def on_step_end(self, *_, **__):
            log["step"].append(synchronized() - self.started)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    texts = prompt_texts(request)
    trainer = Timed(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=lambda completions, **_: [float(k % 2) for k in range(len(completions))],
        train_dataset=Dataset.from_dict({"prompt": texts}),
        peft_config=LoraConfig(r=request.rank, lora_alpha=request.rank, target_modules="all-linear"),
        args=trl_config(request),
        callbacks=[Clock()],
    )
    with MemoryWindow() as window:
        trainer.train()
    steps, generations = log["step"][1:], log["generate"][1:]
    return {
        "step_seconds": min(steps),
        # Scoring is in what TRL calls generation; the rest of the step is gradients and the optimiser.
        "update_seconds": min(step - made for step, made in zip(steps, generations, strict=True)),
        "generate_seconds": min(generations),
        "run_rise_bytes": window.rise,
        "steps": len(log["step"]),
    }


def transformers_generate(request: argparse.Namespace) -> dict[str, Any]:
    """In the child: transformers.generate on the bare model, all sequences at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(request.model or request.shape, Path(request.scratch))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    given = tokenizer(prompt_texts(request), return_tensors="pt", padding=True).to(device)
    seconds = []
    for _ in range(request.steps + 1):
        started = synchronized()
        with torch.no_grad():
            made = model.generate(
                input_ids=given["input_ids"],
                attention_mask=given["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=request.group,
                min_new_tokens=request.new_tokens,
                max_new_tokens=request.new_tokens,
            )
        seconds.append(synchronized() - started)
    tokens = made.shape[0] * (made.shape[1] - given["input_ids"].shape[1])
    return {"tokens_per_second": tokens / min(seconds[1:])}


CHILDREN = {
    "machine": machine,
    "lora": lambda request: ours(request, "lora"),
    "full": lambda request: ours(request, "full"),
    "trl": trl,
    "transformers": transformers_generate,
}


def rows_of(measured: dict[str, Any], request: argparse.Namespace) -> list[Row]:
    """The table, of the arms that were run."""
    lora, full, peer, plain = (measured.get(arm) for arm in ARMS)
    rows = []
    if lora and peer:
        rows += [
            seconds_row("GRPO step, seconds (TRL / ours)", lora["step_seconds"], peer["step_seconds"], "TRL"),
            seconds_row("update, seconds (TRL / ours)", lora["seconds"]["update"], peer["update_seconds"], "TRL"),
        ]
    if lora and plain:
        ours_rate, theirs = lora["tokens_per_second"], plain["tokens_per_second"]
        rows.append(Row("sampling, tokens/s", f"{ours_rate:,.0f}", f"{theirs:,.0f} transformers.generate",
                        ours_rate / theirs, "more is better"))  # fmt: skip
    if lora:
        floor, seconds = decode_floor(lora, measured["machine"], request), lora["decode"]["seconds"]
        rows.append(Row("decoding, seconds (floor / ours)", f"{seconds:.3f}", f"{floor:.3f} reading weights and cache",
                        floor / seconds, "1"))  # fmt: skip
    if lora and full:
        kept = lora["memory_bytes"] / full["memory_bytes"]
        rows += [
            Row("trainer memory, GB (LoRA / full)", f"{lora['memory_bytes'] / 1e9:.3f}",
                f"{full['memory_bytes'] / 1e9:.3f} full", kept, "at most 0.2 asked; activations are in both"),
            Row("update, seconds (LoRA / full)", f"{lora['seconds']['update']:.3f}",
                f"{full['seconds']['update']:.3f} full", lora["seconds"]["update"] / full["seconds"]["update"],
                "2/3 + r/in + r/out by arithmetic"),
            Row("step, seconds (LoRA / full)", f"{lora['step_seconds']:.3f}", f"{full['step_seconds']:.3f} full",
                lora["step_seconds"] / full["step_seconds"], "sampling costs both the same"),
        ]  # fmt: skip
    return rows


def looked_up_bytes(model: Any) -> int:
    """Of an embedding that is no output head: a step reads a few of its rows."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return 0 if embedding is head else embedding.nbytes


def seconds_row(what: str, mine: float, theirs: float, whose: str) -> Row:
    """Two times; the ratio is how many times faster we are."""
    return Row(what, f"{mine:.3f}", f"{theirs:.3f} {whose}", theirs / mine, "more is better")


def decode_floor(lora: dict[str, Any], machine: dict[str, Any], request: argparse.Namespace) -> float:
    """Seconds to read, in every step, all weights, each prompt's cache once and each completion's own."""
    steps, sequences = lora["decode"]["steps"], request.prompts * request.group
    shared = request.prompts * lora["prompt_tokens"] * steps
    own = sequences * steps * (steps + 1) / 2
    read = steps * lora["read_bytes"] + (shared + own) * lora["cache_bytes_a_token"]
    # A copy reads and writes; a read alone gets about the same rate out of the same bus.
    return read / machine["copy_bytes_per_second"]


if __name__ == "__main__":
    main()
