"""A GRPO update against TRL's GRPOTrainer, on the same prompts, model, lengths and adapter; and equal losses.

    python -m benchmarks.trl_grpo                  # about half an hour on two cores
    python -m benchmarks.trl_grpo --shapes short --updates 2

An update is sample, score, update, sync. Every group has a spread of rewards, so nothing is skipped that TRL trains on.
The floor is arithmetic: the operations that the sampled tokens need, at the rate of a large matrix product.
"""

import argparse
import hashlib
import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import Row, in_child, matmul_rate, save

SHAPES = {"short": (32, 8, 16), "long": (16, 8, 128)}  # prompts, completions of each, most new tokens
ASKED = {"short": 10.0, "long": 4.0}  # times faster than TRL
LONGEST_PROFILED = 32  # new tokens: a profile of more takes minutes and gigabytes to sum up
WARM_UPS = 2  # of ours: the first touch of a page of memory costs more than its use
RANK = 32
MODEL = "bundled://smollm2-135m-instruct"


def main() -> None:
    """Measure ours, TRL's variants, the best of them again with ours; print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--shapes", default="short,long", help="of: short, long")
    parser.add_argument("--updates", type=int, default=3, help="of ours, measured after two that warm up")
    parser.add_argument("--trl-updates", type=int, default=2, help="of TRL's best variant, measured after one")
    parser.add_argument("--variants", help="of trl_peer.VARIANTS, by semicolon: the ones to try (default: all)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, *rest = arguments.child
        print(json.dumps({"ours": ours, "trl": theirs, "loss": losses}[what](*rest)))
        return
    rows, details = [], {}
    equal = _child("loss", arguments.model)
    details["equal_loss"] = equal
    rows.append(Row("loss on equal rollouts, fp32", f"{equal['ours'][0]:.7f}", f"TRL {equal['trl'][0]:.7f}",
                    equal["ours"][0] / equal["trl"][0], "1"))  # fmt: skip
    rows.append(Row("norm of its gradient", f"{equal['ours'][1]:.7f}", f"TRL {equal['trl'][1]:.7f}",
                    equal["ours"][1] / equal["trl"][1], "1"))  # fmt: skip
    for shape in arguments.shapes.split(","):
        measured = compare(arguments, shape, details)
        details[shape] = measured
        rows += table_rows(shape, measured)
    save("trl_grpo", rows, details)


def compare(arguments: argparse.Namespace, shape: str, earlier: dict[str, Any]) -> dict[str, Any]:
    """Ours, one update of each of TRL's variants, the best variant at length, ours again.

    A shape that follows another one takes the variant that was best there: at 128 tokens TRL's update takes minutes.
    """
    from benchmarks.trl_peer import VARIANTS

    model, updates, trl_updates = arguments.model, arguments.updates, arguments.trl_updates
    variants = arguments.variants.split(";") if arguments.variants else VARIANTS
    first = _child("ours", model, shape, str(updates))
    best = next((measured["trl"]["variant"] for measured in earlier.values() if "trl_tried" in measured), "")
    tried = {} if best else {variant: _child("trl", model, shape, "1", variant) for variant in variants}
    best = best or min(tried, key=lambda variant: tried[variant]["seconds"][-1])
    peer = tried.get(best) if trl_updates == 1 else None
    peer = peer or _child("trl", model, shape, str(trl_updates), best)
    second = _child("ours", model, shape, str(updates))
    rate = matmul_rate()
    return {
        "ours": [first, second],
        "trl_tried": {variant: result["seconds"] for variant, result in tried.items()},
        "trl": {"variant": best, **peer},
        "matmul_flops": rate,
        "floor_seconds": second["flops"] / rate,
    }


def table_rows(shape: str, measured: dict[str, Any]) -> list[Row]:
    """The ratio to TRL, and to the floor."""
    prompts, samples, tokens = SHAPES[shape]
    work = f"{prompts} x {samples} x up to {tokens} tokens"
    seconds = statistics.median(s for run in measured["ours"] for s in run["seconds"][WARM_UPS:])
    peer = statistics.median(measured["trl"]["seconds"][1:])
    floor = measured["floor_seconds"]
    products = min(run.get("products_seconds", 0.0) for run in measured["ours"])
    rows = [
        Row(f"GRPO update, {work}: speed", f"{seconds:.2f} s", f"TRL {peer:.1f} s ({measured['trl']['variant']})",
            peer / seconds, f"{ASKED[shape]:.0f} asked"),
        Row(f"GRPO update, {work}: share of the arithmetic floor", f"{seconds:.2f} s",
            f"floor {floor:.2f} s at {measured['matmul_flops'] / 1e12:.2f} TFLOP/s", floor / seconds, "0.5 asked"),
    ]  # fmt: skip
    if products:
        rows.append(Row(f"GRPO update, {work}: share of its own matrix products", f"{seconds:.2f} s",
                        f"products {products:.2f} s", products / seconds, "1 if nothing else took time"))  # fmt: skip
    return rows


def _child(*arguments: str) -> dict[str, Any]:
    return in_child(Path(__file__), *arguments)


def messages(shape: str, update: int) -> list[list[dict]]:
    """The prompts of an update, as chat messages."""
    numbers = random.Random(update)
    asked = []
    for _ in range(SHAPES[shape][0]):
        a, b, days = numbers.randint(10, 99), numbers.randint(10, 99), numbers.randint(2, 9)
        text = f"What is {a} plus {b}?"
        if shape == "long":
            text = (f"A farmer has {a} apples and picks {b} more every day. After {days} days half of them are sold. "
                    "Explain step by step how many apples are left.")  # fmt: skip
        asked.append([{"role": "user", "content": text}])
    return asked


def reward(token_ids: list[int]) -> float:
    """A number in [0, 1] that depends on every token: no two different completions have the same."""
    return int.from_bytes(hashlib.sha256(str(token_ids).encode()).digest()[:4]) / 2**32


def ours(model_uri: str, shape: str, updates: str) -> dict[str, Any]:
    """Seconds of every update and its phases, tokens, and the operations that it needs."""
    from torch.profiler import ProfilerActivity, profile

    from tuneloop.data.chat import render_prompts
    from tuneloop.memory import keep_freed_memory
    from tuneloop.rollout.engine import SampleStream
    from tuneloop.settings import SamplingSettings
    from tuneloop.world import World

    keep_freed_memory()
    prompts, samples, tokens = SHAPES[shape]
    policy, sync, tokenizer, learner = _set_up(model_uri, prompts, samples, World())
    sync()
    seconds, phases, flops = [], [], 0.0

    def one(update: int) -> None:
        nonlocal flops
        asked = render_prompts(tokenizer, messages(shape, update))
        marks = [time.perf_counter()]
        sampled = sync.engine.generate(
            asked, samples=samples, sampling=SamplingSettings(), max_new_tokens=tokens, stream=SampleStream(1, update)
        )
        rollout = _rollout(asked, sampled)
        marks.append(time.perf_counter())
        minibatches, _ = learner.score(rollout)
        marks.append(time.perf_counter())
        learner.update(minibatches)
        marks.append(time.perf_counter())
        sync()
        marks.append(time.perf_counter())
        seconds.append(marks[-1] - marks[0])
        names = ("collect", "score", "update", "sync")
        phases.append({name: b - a for name, a, b in zip(names, marks, marks[1:], strict=False)})
        flops = operations(policy, sum(map(len, asked)), rollout.tokens(), prompts * samples)

    for update in range(int(updates) + WARM_UPS):
        one(update)
    result = {"seconds": list(seconds), "phases": list(phases), "flops": flops}
    if tokens > LONGEST_PROFILED:
        return result
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        one(int(updates) + WARM_UPS)
    spent = {event.key: event.self_cpu_time_total / 1e6 for event in profiled.key_averages()}
    products = sum(spent.get(f"aten::{name}", 0.0) for name in ("mm", "addmm", "addmm_", "bmm"))
    return result | {"products_seconds": products}


def operations(policy: Any, prompt_tokens: int, sampled: int, completions: int) -> float:
    """Multiplications and additions of one update, attention left out.

    A token costs two operations a weight that it meets in a forward pass; backward costs as much again for the gradient
    of the layer's input, and for the adapter's own weights three times a forward pass in all. Prompts of a group count
    once, and the last token of a completion is sampled but not fed.
    """
    head = policy.model.get_output_embeddings().weight.numel()
    linear = sum(layer.base.weight.numel() for layer in policy.layers.values())
    adapter = sum(layer.A.numel() + layer.B.numel() for layer in policy.layers.values())
    fed = prompt_tokens + sampled - completions
    sampling = 2 * linear * fed + 2 * head * sampled
    training = fed * (4 * linear + 6 * adapter) + 4 * head * sampled
    return float(sampling + training)


def theirs(model_uri: str, shape: str, updates: str, variant: str) -> dict[str, Any]:
    """TRL on the same prompts."""
    from benchmarks.trl_peer import seconds_of_updates
    from tuneloop.models.sources import resolve_model

    _, samples, tokens = SHAPES[shape]
    prompts = [messages(shape, update) for update in range(int(updates) + 1)]
    return seconds_of_updates(str(resolve_model(model_uri)), prompts, samples, tokens, variant, reward, RANK)


def losses(model_uri: str) -> dict[str, Any]:
    """Loss and gradient norm of both on the same completions, off-policy so that ratios and clipping count."""
    from benchmarks.trl_peer import loss_and_gradient
    from tuneloop.algorithms.advantages import grpo_advantages
    from tuneloop.data.chat import render_prompts
    from tuneloop.models.adapter_io import save_adapter
    from tuneloop.models.sources import resolve_model
    from tuneloop.rollout.engine import SampleStream
    from tuneloop.settings import SamplingSettings
    from tuneloop.world import World

    policy, sync, tokenizer, learner = _set_up(model_uri, 4, 4, World(), dtype="float32")
    _disturb(policy, 0)
    sync()
    asked = render_prompts(tokenizer, messages("short", 0)[:4])
    sampled = sync.engine.generate(
        asked, samples=4, sampling=SamplingSettings(), max_new_tokens=16, stream=SampleStream(1, 0)
    )
    rollout = _rollout(asked, sampled)
    [minibatch], _ = learner.score(rollout)
    _disturb(policy, 1)  # the policy moves away from the one that sampled, as in a later minibatch
    minibatch.micro[:] = [replace(micro, old_S=micro.behaviour_S) for micro in minibatch.micro]
    given = {
        "prompts": [prompt for prompt, group in zip(asked, sampled, strict=True) for _ in group],
        "completions": [completion.token_ids for group in sampled for completion in group],
        "old_logprobs": [completion.logprobs for group in sampled for completion in group],
        "advantages": grpo_advantages(rollout.rewards_NG()).flatten().tolist(),
    }
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(policy.adapter(), Path(folder))
        peer = loss_and_gradient(str(resolve_model(model_uri)), folder, given)
    values = learner.update([minibatch])
    return {"ours": [values["loss/policy"], values["gradient/norm"]], "trl": list(peer)}


def _disturb(policy: Any, seed: int) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    for layer in policy.layers.values():
        layer.B.data.add_(1e-3 * torch.randn(layer.B.shape, generator=generator))


def _set_up(model_uri: str, prompts: int, samples: int, world: Any, dtype: str = "bfloat16") -> tuple:
    from components.lora_rl.training import enough_canaries
    from tuneloop.data.chat import render_prompts
    from tuneloop.models.load import load_model, load_tokenizer
    from tuneloop.models.lora import attach, peft_config
    from tuneloop.models.sources import resolve_model
    from tuneloop.rollout.torch_engine import TorchEngine
    from tuneloop.rollout.weight_sync import Canary, WeightSync
    from tuneloop.settings import LoraSettings, OptimizerSettings
    from tuneloop.training.learner import Learner
    from tuneloop.training.policy import Policy
    from tuneloop.training.settings import RlSettings

    folder = resolve_model(model_uri)
    tokenizer, model = load_tokenizer(folder), load_model(folder, dtype)
    lora = LoraSettings(rank=RANK, alpha=float(RANK))
    layers = attach(model, lora, 0)
    config = peft_config(lora, layers, model, str(folder))
    policy = Policy(model, layers, config)
    fixed = render_prompts(tokenizer, messages("short", 99))
    canaries = enough_canaries(Canary(prompt, list(range(11, 23))) for prompt in fixed)
    sync = WeightSync(TorchEngine.sharing(model, tokenizer), model, layers, config, canaries, 0.5)
    settings = RlSettings(prompts_per_update=prompts, group_size=samples, updates=100,
                          optimizer=OptimizerSettings(learning_rate=1e-5))  # fmt: skip
    return policy, sync, tokenizer, Learner(policy, settings, world)


def _rollout(prompts: list[list[int]], sampled: list) -> Any:
    from tuneloop.data.schema import Example
    from tuneloop.rewards.base import Score
    from tuneloop.training.collect import Rollout, RolloutGroup

    groups = []
    for number, (prompt, completions) in enumerate(zip(prompts, sampled, strict=True)):
        scores = [Score(reward(c.token_ids), {"hash": reward(c.token_ids)}, "hash") for c in completions]
        example = Example(id=str(number), messages=[], answer="", completion="", reward_kind="", source="",
                          metadata={})  # fmt: skip
        groups.append(RolloutGroup(example, prompt, completions, [""] * len(completions), scores))
    return Rollout(groups)


if __name__ == "__main__":
    main()
