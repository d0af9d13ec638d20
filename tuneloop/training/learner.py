"""The half of the RL loop that learns: policy, reference and optimiser."""

import torch

from tuneloop.training.collect import Rollout
from tuneloop.training.optim import MasterAdamW, Optimizer
from tuneloop.training.policy import Policy
from tuneloop.training.reference import ReferencePolicy
from tuneloop.training.score import Minibatch, probe_kl, score_rollout
from tuneloop.training.settings import RlSettings
from tuneloop.training.update import update_policy
from tuneloop.training.world import World


class Learner:
    """Everything that is trained, and what a checkpoint must hold of it.

    The reference for KL is the policy as it is given, before any checkpoint is loaded: what the warm-up left.
    """

    def __init__(self, policy: Policy, settings: RlSettings, world: World):
        self.policy, self.settings, self.world = policy, settings, world
        self.reference = ReferencePolicy(policy.model, policy.layers, policy.adapter())
        steps = settings.updates * settings.algorithm.minibatches
        self.optimizer: Optimizer = MasterAdamW(policy.parameters(), settings.optimizer, steps)

    def score(self, rollout: Rollout) -> tuple[list[Minibatch], dict[str, float]]:
        """What this process's optimiser steps learn from, and metrics."""
        model, settings = self.policy.model, self.settings
        minibatches = score_rollout(model, self.reference, rollout, settings, self.world)
        if settings.algorithm.kl_coefficient > 0:
            return minibatches, {}
        kl = probe_kl(model, self.reference, rollout, settings.sampling.temperature)
        return minibatches, {"kl/reference": kl}

    def update(self, minibatches: list[Minibatch]) -> dict[str, float]:
        """One optimiser step a minibatch; returns metrics."""
        return update_policy(self.policy.model, self.optimizer, minibatches, self.settings, self.world)

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors from which `load_state` continues to the last bit, whatever the number of processes."""
        return self.optimizer.state()

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state()`."""
        self.optimizer.load_state(state)

    def release(self) -> None:
        """Leave the policy's parameters to somebody else."""
        self.optimizer.release()
