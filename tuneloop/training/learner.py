"""The half of the RL loop that learns: policy, heads, reference, optimiser, and the coefficient of KL."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import cast

import torch
from torch import nn

from tuneloop.algorithms.kl import steered_coefficient
from tuneloop.algorithms.table import ALGORITHMS
from tuneloop.training.collect import Rollout
from tuneloop.training.heads import make_heads
from tuneloop.training.optim import AnnouncedSteps, MasterAdamW, Optimizer
from tuneloop.training.policy import Policy
from tuneloop.training.rank_schedule import RankScheduler
from tuneloop.training.score import Minibatch, score_rollout
from tuneloop.training.settings import RlSettings
from tuneloop.training.update import update_policy
from tuneloop.world import World


class Learner:
    """Everything that is trained, and what a checkpoint must hold of it.

    The reference for KL is the policy as it is given, before any checkpoint is loaded: what the warm-up left.

    Args:
        policy: what is trained.
        seed: of the heads' first weights.
        max_new_tokens: the longest completion.

    Attributes:
        heads: what the algorithm trains beside the adapter; empty for most.
        kl_coefficient: of the next update; settings.algorithm.kl_coefficient unless it is steered to a target.
        before_step: called before an update changes what a checkpoint holds.
    """

    def __init__(self, policy: Policy, settings: RlSettings, world: World, *, seed: int = 0, max_new_tokens: int = 0):
        self.policy, self.settings, self.world, self.max_new_tokens = policy, settings, world, max_new_tokens
        self.before_step: Callable[[], None] = lambda: None
        algorithm = ALGORITHMS[settings.algorithm.name]
        self.reference = policy.reference(algorithm.needs_reference or settings.algorithm.kl_coefficient > 0)
        self.ranks = RankScheduler(policy, settings.rank_schedule, settings.updates)
        self.heads = make_heads(algorithm.heads, policy.model, seed)
        self.kl_coefficient = settings.algorithm.kl_coefficient
        self.optimizer = self._make_optimizer()
        self._measured_kl: float | None = None  # by the score phase

    def _make_optimizer(self) -> Optimizer:
        settings = self.settings
        steps = settings.updates * settings.algorithm.minibatches
        if not self.world.together:
            return MasterAdamW(self.parameters(), settings.optimizer, steps)
        from tuneloop.training.zero import ZeroAdamW  # DeepSpeed is not installed everywhere

        return ZeroAdamW(self.policy.model, self.parameters(), settings.optimizer, steps, settings.distributed)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that is trained: the policy's, then the heads'."""
        return chain(self.policy.parameters(), self.heads.named_parameters(prefix="heads"))

    def score(self, rollout: Rollout) -> tuple[list[Minibatch], dict[str, float]]:
        """What this process's optimiser steps learn from, and metrics."""
        minibatches, metrics = score_rollout(
            self.policy.model,
            self.reference,
            rollout,
            self._settings_now(),
            self.world,
            heads=self.heads,
            max_new_tokens=self.max_new_tokens,
        )
        self._measured_kl = metrics.get("kl/reference")
        return minibatches, metrics

    def update(self, minibatches: list[Minibatch]) -> dict[str, float]:
        """One optimiser step a minibatch, then one of KL's coefficient; returns metrics."""
        optimizer = cast(Optimizer, AnnouncedSteps(self.optimizer, self.before_step))
        settings, algorithm = self._settings_now(), self.settings.algorithm
        values = update_policy(self.policy.model, optimizer, minibatches, settings, self.world, self.heads)
        if algorithm.kl_coefficient == 0:
            return values
        values["kl/coefficient"] = self.kl_coefficient
        kl = values.get("kl/reference", self._measured_kl)
        if algorithm.kl_target > 0 and kl is not None:
            self.before_step()
            completions = sum(minibatch.completion_total for minibatch in minibatches)
            self.kl_coefficient = steered_coefficient(self.kl_coefficient, kl, completions, algorithm)
        return values

    def change_ranks(self, update: int) -> dict[str, float]:
        """What `[lora_rl.rank_schedule]` does at the end of an update (from 1); returns metrics."""
        if not self.ranks.on:
            return {}
        dropped = 0.0
        if self.ranks.due(update):
            self.before_step()
            shapes = [(name, parameter.shape) for name, parameter in self.parameters()]
            state, dropped = self.ranks.change(update, self.optimizer.state(), shapes)
            self._replace_optimizer(state)
        return {**self.ranks.metrics(), "rank/dropped": dropped}

    def _replace_optimizer(self, state: dict[str, torch.Tensor]) -> None:
        """One for the factors that the layers have now; the state is for those."""
        self.optimizer.release()
        self.optimizer = self._make_optimizer()
        self.optimizer.load_state(state)

    def _settings_now(self) -> RlSettings:
        """The settings with what is known only here: the coefficient of KL as it is, and the longest completion."""
        algorithm = self.settings.algorithm
        changes = {"kl_coefficient": self.kl_coefficient, "length_norm": algorithm.length_norm or self.max_new_tokens}
        return self.settings.model_copy(update={"algorithm": algorithm.model_copy(update=changes)})

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors from which `load_state` continues to the last bit, whatever the number of processes."""
        coefficient = torch.tensor(self.kl_coefficient, dtype=torch.float64)
        ranks = self.ranks.state() if self.ranks.on else {}
        return {**self.optimizer.state(), "kl_coefficient": coefficient, **ranks}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state()`."""
        self.kl_coefficient = float(state["kl_coefficient"])
        if self.ranks.on:
            self.ranks.load_state(state)
            self._replace_optimizer(state)
        else:
            self.optimizer.load_state(state)

    def release(self) -> None:
        """Leave the policy's parameters to somebody else."""
        self.optimizer.release()
