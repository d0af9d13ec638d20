"""TRL's GRPOTrainer on the work of `benchmarks/trl_grpo.py`: seconds an update, and its loss on given rollouts."""

import tempfile
import time
from typing import Any

import torch
import trl.import_utils as import_utils
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

# A vLLM that is installed for something else would only be imported here: generation is transformers' own.
import_utils.is_vllm_available = lambda *_arguments, **_options: False

from trl import GRPOConfig, GRPOTrainer  # noqa: E402

VARIANTS = {  # name -> sequences of one forward pass, adapters left in fp32 under autocast (TRL's own way)
    "32 a pass, autocast": (32, True),
    "64 a pass, autocast": (64, True),
    "64 a pass, adapters in bfloat16": (64, False),
}


def seconds_of_updates(folder: str, prompts: list[list[list[dict]]], samples: int, tokens: int, variant: str,
                       reward: Any, rank: int) -> dict[str, Any]:  # fmt: skip
    """Seconds of every update (the first warms up) and the mean completion length.

    Args:
        prompts: for each update, chat messages of its prompts.
        reward: completion token ids -> float.
    """
    at_once, autocast = VARIANTS[variant]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    def rewards(completion_ids: Any = None, **_: Any) -> list[float]:
        return [reward([int(token) for token in ids]) for ids in completion_ids]

    rows = [{"prompt": messages} for update in prompts for messages in update]
    arguments = _arguments(len(prompts[0]) * samples, at_once, samples, tokens, len(prompts), autocast)
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        reward_funcs=rewards,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(folder),
        peft_config=LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    if not autocast:
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    trainer.train()
    lengths = [row["completions/mean_length"] for row in trainer.state.log_history if "completions/mean_length" in row]
    return {"seconds": seconds, "completion_tokens": sum(lengths) / len(lengths)}


def loss_and_gradient(folder: str, adapter: str, rollout: dict[str, Any]) -> tuple[float, float]:
    """TRL's loss on given completions, and the norm of its gradient over the adapter; fp32.

    Args:
        rollout: `prompts` and `completions` (token ids), `advantages`, `old_logprobs`, one a completion.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=_arguments(2, 2, 2, 8, 1, autocast=False),
        train_dataset=Dataset.from_list([{"prompt": "x"}]),
        processing_class=_tokenizer(folder),
    )
    columns = {"prompt": ("prompts", True), "completion": ("completions", False)}
    inputs: dict[str, Any] = {}
    for name, (key, left) in columns.items():
        rows = rollout[key]
        width = max(map(len, rows))
        pads = [[0] * (width - len(row)) for row in rows]
        ids = [pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)]
        mask = [
            [0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
            for row, pad in zip(rows, pads, strict=True)
        ]
        inputs |= {f"{name}_ids": torch.tensor(ids), f"{name}_mask": torch.tensor(mask)}
    width = inputs["completion_ids"].shape[1]
    old = [row + [0.0] * (width - len(row)) for row in rollout["old_logprobs"]]
    inputs |= {"advantages": torch.tensor(rollout["advantages"]), "old_per_token_logps": torch.tensor(old)}
    inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
    trainer.model.eval()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad and p.grad is not None]
    return float(loss.detach()), float(torch.cat(gradients).norm())


def _tokenizer(folder: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    return tokenizer


def _arguments(total: int, at_once: int, samples: int, tokens: int, updates: int, autocast: bool) -> GRPOConfig:
    return GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=max(1, total // at_once),
        num_generations=samples,
        max_completion_length=tokens,
        max_steps=updates,
        learning_rate=1e-5,
        bf16=autocast,
        beta=0.0,
        loss_type="dapo",
        gradient_checkpointing=False,
        shuffle_dataset=False,
        temperature=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
