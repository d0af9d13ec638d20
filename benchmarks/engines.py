"""Decoding rates: our torch engine against transformers.generate on merged weights and against vLLM.

    python -m benchmarks.engines                              # SmolLM2-135M, 32 x 8 x 16 and 16 x 8 x 128
    python -m benchmarks.engines --model tiny --work 2x2x8    # a look in a minute

Each engine is a process of its own, has the same adapter, gets the same prompts, samples at temperature 1 until the
model ends a completion or the limit is reached, and is timed from prompts to completions, prefill included, best of
three. Only tokens of completions count: what is computed behind an end, or for padding, does not.

The floor is the time that this machine needs, by its own measured rates, to read the weights once a step or to multiply
them with all sequences' activations, whichever is longer, and to prefill each prompt once.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Row, in_child, matmul_rate, read_rate, save, seconds_of
from benchmarks.workload import model_folder, random_adapter, random_prompts
from tuneloop.errors import TuneloopError

ENGINES = ("torch", "transformers", "vllm", "vllm-merged")
SEEDED = " (a seed a request, as runs need it)"
RANK = 32


def main() -> None:
    """Measure every engine on every shape of work, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled://smollm2-135m-instruct", help="a URI, or tiny, 0.5b, 1.5b, 7b")
    parser.add_argument("--work", nargs="+", default=["32x8x16", "16x8x128"], metavar="PROMPTSxSAMPLESxTOKENS")
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--child", nargs=2, metavar=("ENGINE", "REQUEST"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        engine, request = arguments.child
        try:
            print(json.dumps(CHILDREN[engine](json.loads(request))))
        except TuneloopError as error:  # an engine that cannot serve this model here
            print(json.dumps({"skipped": str(error)}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        request = {
            "model": arguments.model,
            "scratch": scratch,
            "work": [[int(part) for part in work.split("x")] for work in arguments.work],
            "prompt_tokens": arguments.prompt_tokens,
        }
        prepared = in_child(Path(__file__), "prepare", json.dumps(request))
        measured, skipped = {}, {}
        for engine in arguments.engines:
            print(f"engines: {engine}", file=sys.stderr, flush=True)
            reason = missing(engine)
            found = {"skipped": reason} if reason else in_child(Path(__file__), engine, json.dumps(request))
            if "skipped" in found:
                skipped[engine] = found["skipped"]
                print(f"skipped {engine}: {found['skipped']}", flush=True)
            else:
                measured[engine] = found
    rows = rows_of(arguments.work, measured, prepared["floors"])
    save("engines", rows, {"model": arguments.model, "prepared": prepared, "measured": measured, "skipped": skipped})


def missing(engine: str) -> str:
    """Why an engine cannot run here; empty when it can."""
    from importlib.util import find_spec

    return "vllm is not installed" if engine.startswith("vllm") and find_spec("vllm") is None else ""


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """In the child: the model, an adapter for it, and what the machine could do at best."""
    from tuneloop.models.adapter_io import save_adapter
    from tuneloop.models.load import load_model

    scratch = Path(request["scratch"])
    folder = model_folder(request["model"], scratch)
    model = load_model(folder, "bfloat16")
    # Of weights that a token is multiplied with: an embedding that is not the head too is only looked up.
    weights = sum(p.numel() for p in model.parameters())
    if not model.config.tie_word_embeddings:
        weights -= model.get_input_embeddings().weight.numel()
    _, adapter = random_adapter(model, RANK)
    save_adapter(adapter, scratch / "adapter")
    flops, bandwidth = matmul_rate(), read_rate()
    floors = []
    for prompts, samples, tokens in request["work"]:
        sequences = prompts * samples
        step = max(2 * weights / bandwidth, 2 * weights * sequences / flops)
        prefill = max(2 * weights / bandwidth, 2 * weights * prompts * request["prompt_tokens"] / flops)
        floors.append(sequences * tokens / (prefill + tokens * step))
    return {"weights": weights, "matmul_flops": flops, "read_bytes_per_second": bandwidth, "floors": floors}


def measure(request: dict[str, Any], generate) -> list[dict[str, float]]:
    """Tokens a second of each shape; `generate(prompts, samples, tokens)` returns how many tokens it made."""
    results = []
    for prompts, samples, tokens in request["work"]:
        asked = random_prompts(prompts, request["prompt_tokens"])
        generate(asked[:2], samples, 2)  # whatever happens only once
        runs = []
        for _ in range(3):  # lengths differ from run to run where sampling has no seed
            made: list[int] = []
            seconds = seconds_of(lambda a=asked, s=samples, t=tokens, m=made: m.append(generate(a, s, t)), 1)
            runs.append({"tokens": made[0], "seconds": seconds, "tokens_per_second": made[0] / seconds})
        results.append(max(runs, key=lambda run: run["tokens_per_second"]))
    return results


def torch_child(request: dict[str, Any]) -> Any:
    """In the child: the built-in engine."""
    from tuneloop.rollout.torch_engine import TorchEngine

    engine = TorchEngine(model_folder(request["model"], Path(request["scratch"])), dtype="bfloat16")
    return {"work": measure(request, by_engine(engine, request))}


def vllm_child(request: dict[str, Any], merged: bool = False) -> Any:
    """In the child: vLLM as the library starts it."""
    from tuneloop.models.load import load_model, load_tokenizer
    from tuneloop.rollout.build import build_engine
    from tuneloop.rollout.settings import EngineSettings
    from tuneloop.settings import SamplingSettings

    folder = model_folder(request["model"], Path(request["scratch"]))
    engine = build_engine(
        EngineSettings(kind="vllm", sync="merged" if merged else "adapter", gpu_memory_utilization=0.8),
        load_model(folder, "bfloat16", "cpu"),
        load_tokenizer(folder),
        base_folder=folder,
        dtype="bfloat16",
        max_length=request["prompt_tokens"] + max(tokens for _, _, tokens in request["work"]),
        max_rank=RANK,
        sampling=SamplingSettings(),
        log=Path(request["scratch"]) / "vllm.log",
    )
    try:
        return {"work": measure(request, by_engine(engine, request))}
    finally:
        engine.close()


def by_engine(engine: Any, request: dict[str, Any]):
    """`generate` of one of our engines, with the adapter."""
    from tuneloop.models.adapter_io import load_adapter
    from tuneloop.rollout.engine import SampleStream
    from tuneloop.settings import SamplingSettings

    engine.sync(load_adapter(Path(request["scratch"]) / "adapter"))

    def generate(prompts: list[list[int]], samples: int, tokens: int) -> int:
        groups = engine.generate(
            prompts, samples=samples, sampling=SamplingSettings(), max_new_tokens=tokens, stream=SampleStream(0, 1)
        )
        return sum(len(completion.token_ids) for group in groups for completion in group)

    return generate


def transformers_child(request: dict[str, Any]) -> Any:
    """In the child: transformers.generate, the adapter merged by PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = model_folder(request["model"], Path(request["scratch"]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    model = PeftModel.from_pretrained(base, str(Path(request["scratch"]) / "adapter")).merge_and_unload().eval()
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())

    def generate(prompts: list[list[int]], samples: int, tokens: int) -> int:
        given = torch.tensor(prompts, device=device)
        with torch.no_grad():
            made = model.generate(
                given,
                attention_mask=torch.ones_like(given),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=samples,
                max_new_tokens=tokens,
            )
        rows = made[:, given.shape[1] :].tolist()
        return sum(next((n + 1 for n, token in enumerate(row) if token in ends), len(row)) for row in rows)

    return {"work": measure(request, generate)}


CHILDREN = {
    "prepare": prepare,
    "torch": torch_child,
    "transformers": transformers_child,
    "vllm": vllm_child,
    "vllm-merged": lambda request: vllm_child(request, merged=True),
}


def rows_of(work: list[str], measured: dict[str, Any], floors: list[float]) -> list[Row]:
    """Our rate against each of the others', and against the floor."""
    rows = []
    if "torch" not in measured:
        return rows
    for number, shape in enumerate(work):
        ours = measured["torch"]["work"][number]["tokens_per_second"]
        what = f"{shape}: tokens/s"
        share = ours / floors[number]
        rows.append(Row(f"{what}, of the machine's own floor", f"{ours:,.0f}", f"{floors[number]:,.0f}", share, "1"))
        for engine in ENGINES[1:]:
            if engine in measured:
                theirs = measured[engine]["work"][number]["tokens_per_second"]
                rows.append(
                    Row(
                        what,
                        f"{ours:,.0f}",
                        f"{theirs:,.0f} {engine}{SEEDED if engine.startswith('vllm') else ''}",
                        ours / theirs,
                        "more is better",
                    )
                )
    return rows


if __name__ == "__main__":
    main()
