"""LoRA reinforcement learning: collect → score → update → sync → save."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from tuneloop.data.schema import Example
from tuneloop.errors import TryAgain, UserError
from tuneloop.process import peak_rss_bytes
from tuneloop.progress import Progress
from tuneloop.rewards.base import Scorer
from tuneloop.rollout.engine import SampleStream
from tuneloop.rollout.weight_sync import WeightSync
from tuneloop.settings import SamplingSettings
from tuneloop.training.collect import Rollout, collect
from tuneloop.training.data_order import rows_of_update
from tuneloop.training.dynamic_sampling import collect_with_spread
from tuneloop.training.learner import Learner
from tuneloop.training.policy import Policy
from tuneloop.training.run_state import RunState
from tuneloop.training.score import rollout_gap
from tuneloop.training.settings import RlSettings
from tuneloop.training.stopping import Abandoned, StopRequest
from tuneloop.world import World

GREEDY = SamplingSettings(temperature=0.0)


@dataclass(frozen=True)
class RlTask:
    """What is asked, and how answers are judged."""

    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    train: Sequence[Example]
    validation: Sequence[Example]
    max_new_tokens: int


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

    `run` does everything; whoever trains several policies in turn calls `start`, then `advance` until `done`, then
    `finish`, with the policy installed, and `stop` or `abandon` when `stopping` says so.
    """

    def __init__(
        self,
        policy: Policy,
        sync: WeightSync,
        task: RlTask,
        settings: RlSettings,
        *,
        seed: int,
        folder: Path,
        stopping: StopRequest | None = None,
    ):
        self.policy, self.sync, self.engine, self.task = policy, sync, sync.engine, task
        self.settings, self.seed = settings, seed
        self.world = World()
        self.stopping = stopping or StopRequest(settings.stop_grace_seconds)
        self.learner = Learner(policy, settings, self.world, seed=seed, max_new_tokens=task.max_new_tokens)
        # With every weight trained, a copy of the state would be as much again as training needs.
        copies = self.world.size == 1 and settings.mode == "lora"
        self.state = RunState(folder, self.learner, settings.keep_checkpoints, copies=copies, world=self.world)
        self.learner.before_step = self.state.changes

    @property
    def done(self) -> bool:
        """Whether all updates are made."""
        return self.state.update >= self.settings.updates

    def run(self) -> RlResult:
        """All updates that are left.

        Raises:
            TryAgain: asked to stop; a checkpoint was saved.
            CanaryFailed: the engine does not sample from this policy.
            UserError: a reward failed, or too many completions are cut off.
        """
        with self.stopping, Progress("lora_rl", self.settings.updates, done=self.state.update) as progress:
            try:
                self.start()
                while not self.done:
                    if self.world.any(self.stopping.requested):
                        self.stop()
                    values = self.advance()
                    progress.advance(note=f"reward {values['reward/mean']:.3f}")
            except Abandoned:
                self.abandon()
            except RuntimeError:
                if self.world.size > 1 and self.stopping.requested:  # another process has abandoned it and is gone
                    self.abandon()
                raise
        return self.finish()

    def start(self) -> None:
        """Give the engine its adapter; before the first update, validate.

        Raises:
            Abandoned: asked to stop, and the grace is over.
        """
        with self.stopping.abandonable():
            self.sync()
            values = self._validate(0) if self.state.is_new else {}
        if self.state.is_new:
            self.state.record(0, values)

    def advance(self) -> dict[str, float]:
        """One update, its metrics written, saved when a checkpoint is due; returns the metrics.

        Raises:
            Abandoned: asked to stop, and the grace is over.
        """
        state, settings = self.state, self.settings
        update = state.update + 1
        is_last = update >= settings.updates
        with self.stopping.abandonable():
            values = self._one_update()
            if is_last or update % settings.validate_every == 0:
                values |= self._validate(update)
        state.record(update, values)
        if is_last or update % settings.checkpoint_every == 0:
            state.save()
        return values

    def stop(self) -> None:
        """Save between two updates and raise.

        Raises:
            TryAgain: always.
        """
        self.state.save()
        raise TryAgain(f"stopped after update {self.state.update}, which is saved; run again to continue")

    def abandon(self) -> None:
        """Save what there was before the running update and raise.

        Raises:
            TryAgain: always.
        """
        self.stopping.settle()
        # With several processes, whose state each holds a part of, there is nobody left to save it with.
        saved = self.state.save_abandoned() if self.world.size == 1 else self.state.saved
        raise TryAgain(f"stopped; update {self.state.update + 1} would not have been finished within the "
                       f"{self.settings.stop_grace_seconds:g} s of lora_rl.stop_grace_seconds and was abandoned; "
                       f"run again to continue after update {saved}")  # fmt: skip

    def finish(self) -> RlResult:
        """Close the logs and let go of the policy."""
        self.state.close()
        accuracies = self.state.metrics.column("validation/accuracy")
        if not self.world.is_first:  # its own log may be empty, and its result is not recorded
            accuracies = accuracies or [math.nan]
        digest = self.learner.reference.digest
        return RlResult(self.sync.digest, digest, accuracies[0], accuracies[-1], self.settings.updates)

    def _one_update(self) -> dict[str, float]:
        clock = _Clock()
        torch.manual_seed(self.seed + self.state.update)  # for whatever draws from torch: equal after a resume
        rollout = self._collect()
        values = rollout.metrics(self.task.scorer)
        self._refuse_truncation(values["completion/truncated_share"])
        clock.lap("collect")
        self.engine.sleep()
        minibatches, scored = self.learner.score(rollout)
        clock.lap("score")
        values |= scored | self.learner.update(minibatches)
        values |= self.learner.change_ranks(self.state.update + 1)
        clock.lap("update")
        self.engine.wake()
        if "divergence/mean" not in values:  # nothing to learn from, so no step that measured it
            values["divergence/mean"] = rollout_gap(self.policy.model, rollout, self.settings.sampling, self.world)
        self.sync.refuse_gap(values["divergence/mean"], "rollout")
        values["canary/gap"] = self.sync()
        values["canary/changed"] = float(self.sync.changed)
        values["memory/sync_peak_bytes"] = float(self.sync.peak_bytes)
        clock.lap("sync")
        values["tokens_per_second/rollout"] = rollout.tokens() / clock.seconds["collect"]
        values["tokens_per_second/update"] = values["update/packed_tokens"] / clock.seconds["update"]
        values["memory/peak_rss_bytes"] = float(peak_rss_bytes())
        return values | {f"seconds/{name}": seconds for name, seconds in clock.seconds.items()}

    def _collect(self) -> Rollout:
        wanted, rows = self.settings.prompts_per_update, len(self.task.train)
        update, algorithm = self.state.update, self.settings.algorithm
        if not algorithm.dynamic_sampling:
            return self._sample(rows_of_update(self.seed, update, wanted, rows), range(wanted))
        return collect_with_spread(
            self._sample, seed=self.seed, update=update, wanted=wanted, rows=rows, max_rounds=algorithm.max_resample
        )

    def _sample(self, rows: Sequence[int], names: Sequence[int]) -> Rollout:
        """Completions of training prompts, judged; `names` tell this update's prompts apart in the random numbers."""
        return collect(
            self.engine,
            self.task.tokenizer,
            self.task.scorer,
            [self.task.train[row] for row in rows],
            samples=self.settings.group_size,
            sampling=self.settings.sampling,
            max_new_tokens=self.task.max_new_tokens,
            stream=SampleStream(self.seed, self.state.update + 1, names),
            adapter=self.sync.name,
            world=self.world,
        )

    def _refuse_truncation(self, share: float) -> None:
        if share > self.settings.max_truncated_share:
            raise UserError(
                f"{share:.0%} of the completions are cut off at task.max_new_tokens = {self.task.max_new_tokens}, "
                f"more than lora_rl.max_truncated_share = {self.settings.max_truncated_share:.0%}: raise one of the two"
            )

    def _validate(self, update: int) -> dict[str, float]:
        """Greedy completions of the held-out prompts; the first few are kept for the report."""
        rollout = collect(
            self.engine,
            self.task.tokenizer,
            self.task.scorer,
            self.task.validation,
            samples=1,
            sampling=GREEDY,
            max_new_tokens=self.task.max_new_tokens,
            stream=SampleStream(self.seed, 0),
            adapter=self.sync.name,
            world=self.world,
        )
        self._keep_samples(rollout, update)
        return {
            "validation/reward": float(rollout.rewards_NG().mean()),
            "validation/accuracy": rollout.accuracy(self.task.scorer),
        }

    def _keep_samples(self, rollout: Rollout, update: int) -> None:
        for group in rollout.groups[: self.settings.kept_prompts]:
            self.state.samples.write(
                {
                    "update": update,
                    "prompt_id": group.example.id,
                    "prompt": group.example.messages[-1]["content"],
                    "answer": group.example.answer,
                    "completion": group.texts[0],
                    "reward": group.scores[0].total,
                    "correct": self.task.scorer.is_correct(group.scores[0]),
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
