"""Supervised warm-up: maximum likelihood of the completions, packed, nothing padded.

Legend: S scored tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuneloop.data.chat import render_completions, render_prompts
from tuneloop.data.schema import Example
from tuneloop.errors import TryAgain
from tuneloop.models.forward import score
from tuneloop.models.lora import trainable_parameters
from tuneloop.models.lora_linear import LoraLinear
from tuneloop.models.packed import Group, pack
from tuneloop.progress import Progress
from tuneloop.training.batching import micro_batches, packed_length
from tuneloop.training.data_order import rows_of_update
from tuneloop.training.optim import AnnouncedSteps, MasterAdamW
from tuneloop.training.run_state import RunState
from tuneloop.training.settings import SftSettings
from tuneloop.training.stopping import Abandoned, StopRequest


@dataclass(frozen=True)
class SftResult:
    """Mean validation loss (nats a completion token) before the first and after the last update."""

    first_loss: float
    last_loss: float
    updates: int


def warm_up(
    model: PreTrainedModel,
    layers: dict[str, LoraLinear],
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Example],
    validation: Sequence[Example],
    settings: SftSettings,
    *,
    seed: int,
    folder: Path,
) -> SftResult:
    """Train the adapter (or, with `mode = "full"`, every weight) in place, resuming what `folder` holds.

    Raises:
        TryAgain: asked to stop; a checkpoint was saved.
    """
    if settings.mode == "full":
        model.requires_grad_(True)
        parameters = [(name, parameter) for name, parameter in model.named_parameters()]
    else:
        parameters = list(trainable_parameters(layers))
    optimizer = MasterAdamW(parameters, settings.optimizer, settings.updates)
    # A copy of every weight and its moments would be as much again as training needs: those go back to a checkpoint.
    state = RunState(folder, optimizer, keep=1, copies=settings.mode == "lora")
    loop = _WarmUp(model, tokenizer, train, _groups(tokenizer, validation), settings, optimizer, state, seed)
    with StopRequest(settings.stop_grace_seconds) as stop:
        try:
            loop.run(stop)
        except Abandoned:
            stop.settle()
            saved = state.save_abandoned()
            raise TryAgain(f"stopped; warm-up update {state.update + 1} would not have been finished within the "
                           f"{settings.stop_grace_seconds:g} s of sft_warmup.stop_grace_seconds and was abandoned; "
                           f"run again to continue after update {saved}") from None  # fmt: skip
    state.close()
    losses = state.metrics.column("loss/validation")
    return SftResult(losses[0], losses[-1], settings.updates)


@dataclass
class _WarmUp:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Sequence[Example]
    held_out: Sequence[Group]
    settings: SftSettings
    optimizer: MasterAdamW
    state: RunState
    seed: int

    def run(self, stop: StopRequest) -> None:
        state, settings = self.state, self.settings
        if state.is_new:
            with stop.abandonable():
                values = self._validate()
            state.record(0, values)
        with Progress("sft_warmup", settings.updates, done=state.update) as progress:
            while state.update < settings.updates:
                if stop.requested:
                    state.save()
                    raise TryAgain(f"stopped after warm-up update {state.update}, which is saved; "
                                   "run again to continue")  # fmt: skip
                with stop.abandonable():
                    values = self._one_update()
                state.record(state.update + 1, values)
                if state.update % settings.checkpoint_every == 0 and state.update < settings.updates:
                    state.save()
                progress.advance(note=f"loss {values['loss/train']:.3f}")

    def _one_update(self) -> dict[str, float]:
        settings, update = self.settings, self.state.update
        torch.manual_seed(self.seed + update)  # dropout: equal after a resume
        rows = rows_of_update(self.seed, update, settings.examples_per_update, len(self.train))
        groups = _groups(self.tokenizer, [self.train[row] for row in rows])
        values = _update(self.model, AnnouncedSteps(self.optimizer, self.state.changes), groups, settings)
        if update + 1 == settings.updates or (update + 1) % settings.validate_every == 0:
            values |= self._validate()
        return values

    def _validate(self) -> dict[str, float]:
        return {"loss/validation": validation_loss(self.model, self.held_out, self.settings.micro_batch_tokens)}


def _update(
    model: PreTrainedModel, optimizer: AnnouncedSteps, groups: Sequence[Group], settings: SftSettings
) -> dict[str, float]:
    started = time.perf_counter()
    model.train()
    tokens = sum(len(completions[0]) for _, completions in groups)
    total = 0.0
    for members in micro_batches(groups, settings.micro_batch_tokens):
        batch = pack([groups[index] for index in members], model.device)
        loss = -score(model, batch).logprobs_S.sum() / tokens
        optimizer.backward(loss)
        total += float(loss.detach())
    norm, rate = optimizer.step()
    packed = sum(packed_length(group) for group in groups)
    return {
        "loss/train": total,
        "gradient/norm": norm,
        "learning_rate": rate,
        "tokens_per_second/update": packed / (time.perf_counter() - started),
    }


@torch.no_grad()
def validation_loss(model: PreTrainedModel, groups: Sequence[Group], budget: int) -> float:
    """Mean negative log-likelihood (nats) of a completion token."""
    model.eval()
    total, tokens = 0.0, 0
    for members in micro_batches(groups, budget):
        logprobs_S = score(model, pack([groups[index] for index in members], model.device)).logprobs_S
        total -= float(logprobs_S.sum())
        tokens += logprobs_S.numel()
    return total / tokens


def _groups(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Group]:
    prompts = render_prompts(tokenizer, [example.messages for example in examples])
    completions = render_completions(tokenizer, [example.completion for example in examples])
    return [(prompt, [completion]) for prompt, completion in zip(prompts, completions, strict=True)]
