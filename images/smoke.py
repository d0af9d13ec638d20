"""Shows that an image does its work: `python -m images.smoke`, inside it, runs its steps on the smallest config.

In the base image: check and data_prep, on a model folder made without torch. In the train image also sft_warmup,
lora_rl, merge_adapter and evaluate.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

CONFIG = Path(__file__).with_name("smoke.toml")
WORK = Path(tempfile.gettempdir()) / "smoke"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "max_position_embeddings": 256}
INPUTS = {
    "check": (),
    "data_prep": (),
    "sft_warmup": ("data",),
    "lora_rl": ("data", "warmup"),
    "merge_adapter": ("training", "data", "warmup"),
    "evaluate": ("data", "warmup", "training"),
}
MADE_BY = {"data": "data_prep", "warmup": "sft_warmup", "training": "lora_rl"}
WITHOUT_TORCH = ("check", "data_prep")


def main() -> None:
    """Run the steps one after the other; each is a process of its own, as in a pod."""
    shutil.rmtree(WORK, ignore_errors=True)
    has_torch = find_spec("torch") is not None
    settings = [f"promote.registry='{WORK / 'registry'}'"]
    settings += [] if has_torch else [f"model.uri='{model_without_torch(WORK / 'model')}'"]
    print(describe(), flush=True)
    for step, inputs in INPUTS.items():
        if has_torch or step in WITHOUT_TORCH:
            run(step, inputs, settings)
    print("smoke: every step that this image is for has run", flush=True)


def run(step: str, inputs: tuple[str, ...], settings: list[str]) -> None:
    """Run one step; a failure ends this process with the step's exit code."""
    command = [sys.executable, "-m", f"components.{step}", f"--config={CONFIG}", f"--output={WORK / step}"]
    command += [f"--{name}={WORK / MADE_BY[name]}" for name in inputs] + [f"--set={setting}" for setting in settings]
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout)
        sys.exit(done.returncode)
    print(f"smoke: {step} ran in {time.perf_counter() - started:.0f} s", flush=True)


def describe() -> str:
    """Who this container runs as, and what it may do: facts of the kernel, not of how it was asked to run."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    writable = [folder for folder in ("/", "/app", "/opt/venv", "/etc", "/usr") if os.access(folder, os.W_OK)]
    facts = {"uid": os.getuid(), "capabilities": int(status["CapEff"], 16) | int(status["CapBnd"], 16),
             "no_new_privileges": status["NoNewPrivs"].strip(), "writable": ",".join(writable) or "none"}  # fmt: skip
    return "smoke: " + " ".join(f"{name}={value}" for name, value in facts.items())


def model_without_torch(folder: Path) -> Path:
    """A model's files, all weights zero: what the steps that hold no model read of one."""
    import numpy as np
    from safetensors.numpy import save_file
    from transformers import PreTrainedTokenizerFast, Qwen2Config

    from tuneloop.models.tiny import CHAT_TEMPLATE, byte_tokenizer

    tokenizer = byte_tokenizer()
    words, width, inner = tokenizer.get_vocab_size(), SIZES["hidden_size"], SIZES["intermediate_size"]
    config = Qwen2Config(vocab_size=words, num_attention_heads=2, num_key_value_heads=2,
                         architectures=["Qwen2ForCausalLM"], **SIZES)  # fmt: skip
    config.save_pretrained(folder)
    layer = "model.layers.0"
    shapes = {"model.embed_tokens": (words, width), "lm_head": (words, width)}
    shapes |= {f"{layer}.self_attn.{name}_proj": (width, width) for name in "qkvo"}
    shapes |= {f"{layer}.mlp.{name}_proj": (inner, width) for name in ("gate", "up")}
    shapes |= {f"{layer}.mlp.down_proj": (width, inner)}
    weights = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    ).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
