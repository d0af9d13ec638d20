"""LoRA reinforcement learning: collect → score → update → sync → save."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tuneloop.data.schema import Example
from tuneloop.errors import TryAgain, UserError
from tuneloop.models.adapter_io import Adapter
from tuneloop.models.lora import LoraLinear, extract, trainable_parameters
from tuneloop.process import peak_rss_bytes
from tuneloop.progress import Progress
from tuneloop.rewards.base import Scorer
from tuneloop.rollout.engine import RolloutEngine, SampleStream
from tuneloop.rollout.weight_sync import WeightSync
from tuneloop.settings import SamplingSettings
from tuneloop.training.collect import Rollout, collect
from tuneloop.training.data_order import rows_of_update
from tuneloop.training.optim import MasterAdamW
from tuneloop.training.reference import ReferencePolicy
from tuneloop.training.run_state import RunState
from tuneloop.training.score import probe_kl, score_rollout
from tuneloop.training.settings import RlSettings
from tuneloop.training.stopping import StopRequest
from tuneloop.training.update import update_policy

GREEDY = SamplingSettings(temperature=0.0)


@dataclass
class Policy:
    """What is trained: a model with its adapter layers, and their PEFT config."""

    model: PreTrainedModel
    layers: dict[str, LoraLinear]
    adapter_config: dict

    def adapter(self) -> Adapter:
        """A copy of the adapter as it is now."""
        return extract(self.layers, self.adapter_config)


@dataclass(frozen=True)
class RlResult:
    """Digests, validation accuracy before the first and after the last update, and the updates made."""

    adapter_digest: str
    reference_digest: str
    first_accuracy: float
    last_accuracy: float
    updates: int


class RlTrainer:
    """Trains `policy` in place, resuming what `folder` holds.

    The reference for KL is the policy as it is given, before any checkpoint is loaded: what the warm-up left.
    """

    def __init__(
        self,
        policy: Policy,
        engine: RolloutEngine,
        sync: WeightSync,
        tokenizer: PreTrainedTokenizerBase,
        scorer: Scorer,
        train: Sequence[Example],
        validation: Sequence[Example],
        settings: RlSettings,
        *,
        max_new_tokens: int,
        seed: int,
        folder: Path,
    ):
        self.policy, self.engine, self.sync = policy, engine, sync
        self.tokenizer, self.scorer = tokenizer, scorer
        self.train_examples, self.validation_examples = train, validation
        self.settings, self.max_new_tokens, self.seed = settings, max_new_tokens, seed
        self.reference = ReferencePolicy(policy.model, policy.layers, policy.adapter())
        steps = settings.updates * settings.algorithm.minibatches
        self.optimizer = MasterAdamW(trainable_parameters(policy.layers), settings.optimizer, steps)
        self.state = RunState(folder, self.optimizer, settings.keep_checkpoints)

    def run(self) -> RlResult:
        """All updates that are left.

        Raises:
            TryAgain: asked to stop; a checkpoint was saved.
            CanaryFailed: the engine does not sample from this policy.
            UserError: a reward failed, or too many completions are cut off.
        """
        state, settings = self.state, self.settings
        self.sync()
        if state.update == 0:
            state.metrics.write(0, self._validate())
        with StopRequest() as stop, Progress("lora_rl", settings.updates, done=state.update) as progress:
            while state.update < settings.updates:
                values = self._one_update()
                state.update += 1
                done = state.update == settings.updates
                if done or state.update % settings.validate_every == 0:
                    values |= self._validate()
                state.metrics.write(state.update, values)
                if stop.requested or done or state.update % settings.checkpoint_every == 0:
                    state.save()
                if stop.requested and not done:
                    raise TryAgain(f"stopped after update {state.update}, which is saved; run again to continue")
                progress.advance(note=f"reward {values['reward/mean']:.3f}")
        state.close()
        accuracies = state.metrics.column("validation/accuracy")
        return RlResult(self.sync.digest, self.reference.digest, accuracies[0], accuracies[-1], settings.updates)

    def _one_update(self) -> dict[str, float]:
        settings, model = self.settings, self.policy.model
        clock = _Clock()
        torch.manual_seed(self.seed + self.state.update)  # for whatever draws from torch: equal after a resume
        rows = rows_of_update(self.seed, self.state.update, settings.prompts_per_update, len(self.train_examples))
        rollout = collect(
            self.engine,
            self.tokenizer,
            self.scorer,
            [self.train_examples[row] for row in rows],
            samples=settings.group_size,
            sampling=settings.sampling,
            max_new_tokens=self.max_new_tokens,
            stream=SampleStream(self.seed, self.state.update + 1),
        )
        values = rollout.metrics(self.scorer)
        self._refuse_truncation(values["completion/truncated_share"])
        clock.lap("collect")
        minibatches = score_rollout(model, self.reference, rollout, settings)
        if settings.algorithm.kl_coefficient == 0:
            values["kl/reference"] = probe_kl(model, self.reference, rollout, settings.sampling.temperature)
        clock.lap("score")
        values |= update_policy(model, self.optimizer, minibatches, settings)
        clock.lap("update")
        self.sync.refuse_gap(values.get("divergence/mean", 0.0), "rollout")
        values["canary/gap"] = self.sync()
        values["canary/changed"] = float(self.sync.changed)
        clock.lap("sync")
        values["tokens_per_second/rollout"] = rollout.tokens() / clock.seconds["collect"]
        values["tokens_per_second/update"] = values["update/packed_tokens"] / clock.seconds["update"]
        values["memory/peak_rss_bytes"] = float(peak_rss_bytes())
        return values | {f"seconds/{name}": seconds for name, seconds in clock.seconds.items()}

    def _refuse_truncation(self, share: float) -> None:
        if share > self.settings.max_truncated_share:
            raise UserError(
                f"{share:.0%} of the completions are cut off at task.max_new_tokens = {self.max_new_tokens}, more than "
                f"lora_rl.max_truncated_share = {self.settings.max_truncated_share:.0%}: raise one of the two"
            )

    def _validate(self) -> dict[str, float]:
        """Greedy completions of the held-out prompts; the first few are kept for the report."""
        rollout = collect(
            self.engine,
            self.tokenizer,
            self.scorer,
            self.validation_examples,
            samples=1,
            sampling=GREEDY,
            max_new_tokens=self.max_new_tokens,
            stream=SampleStream(self.seed, 0),
        )
        self._keep_samples(rollout)
        return {
            "validation/reward": float(rollout.rewards_NG().mean()),
            "validation/accuracy": rollout.accuracy(self.scorer),
        }

    def _keep_samples(self, rollout: Rollout) -> None:
        for group in rollout.groups[: self.settings.kept_prompts]:
            self.state.samples.write(
                {
                    "update": self.state.update,
                    "prompt_id": group.example.id,
                    "prompt": group.example.messages[-1]["content"],
                    "answer": group.example.answer,
                    "completion": group.texts[0],
                    "reward": group.scores[0].total,
                    "correct": self.scorer.is_correct(group.scores[0]),
                    "rewards": group.scores[0].parts,
                }
            )


class _Clock:
    """Wall-clock seconds of the phases, in the order in which `lap` ends them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
