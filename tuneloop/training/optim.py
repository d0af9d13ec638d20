"""AdamW on fp32 master copies of parameters that compute in the model's dtype.

Gradients of every micro-batch are added up in fp32. All parameters are views of four flat buffers (master, gradient and
the two moments), so that one fused kernel updates them and a checkpoint is three tensors.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from tuneloop.errors import UserError
from tuneloop.settings import OptimizerSettings


class Optimizer(Protocol):
    """What a training loop needs of an optimiser, whether it works in one process or in several.

    Attributes:
        updates: optimiser steps made.
    """

    updates: int

    def learning_rate(self, update: int) -> float:
        """The rate of optimiser step `update` (from 0)."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, this process's part of the minibatch's loss, to what is collected."""
        ...

    def step(self) -> tuple[float, float]:
        """Apply the gradient summed over all processes and clear it; returns (norm before clipping, learning rate)."""
        ...

    def state(self) -> dict[str, torch.Tensor]:
        """The whole state, whatever the number of processes: the flat tensors of `MasterAdamW.state`."""
        ...

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state()`; the parameters take the masters' values."""
        ...

    def release(self) -> None:
        """Leave the parameters to another optimiser."""
        ...


class AnnouncedSteps:
    """An optimiser that says when it is about to change the parameters.

    Args:
        before_step: called before each step.
    """

    def __init__(self, optimizer: Optimizer, before_step: Callable[[], None]):
        self._optimizer, self._before_step = optimizer, before_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)

    def step(self) -> tuple[float, float]:
        """Announce, then step."""
        self._before_step()
        return self._optimizer.step()


class MasterAdamW:
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101) with linear warm-up, a schedule, and gradient-norm clipping.

    Args:
        parameters: (name, parameter) pairs, in a stable order; each gets a hook that takes its gradient away as soon
            as it is complete.
        total_updates: the length of the schedule, in optimiser steps.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimizerSettings, total_updates: int):
        self.settings, self.total_updates, self.updates = settings, total_updates, 0
        self._parameters = dict(parameters)
        sizes = [parameter.numel() for parameter in self._parameters.values()]
        device = next(iter(self._parameters.values())).device
        self._master = torch.empty(sum(sizes), device=device)
        self._master.grad = torch.zeros_like(self._master)
        self._views = dict(zip(self._parameters, self._master.split(sizes), strict=True))
        gradients = dict(zip(self._parameters, self._master.grad.split(sizes), strict=True))
        self._hooks = []
        for name, parameter in self._parameters.items():
            self._views[name].copy_(parameter.detach().flatten())
            self._hooks.append(parameter.register_post_accumulate_grad_hook(_collector(gradients[name])))
        self._adam = torch.optim.AdamW(
            [self._master],
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def learning_rate(self, update: int) -> float:
        """The rate of optimiser step `update` (from 0)."""
        return scheduled_rate(self.settings, self.total_updates, update)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Optimizer.backward`; the parameters' hooks collect."""
        loss.backward()

    def step(self) -> tuple[float, float]:
        """Apply the collected gradient and clear it; returns (gradient norm before clipping, learning rate).

        Raises:
            UserError: the gradient is not finite; nothing was changed.
        """
        norm = float(torch.linalg.vector_norm(self.gradient))
        require_finite(norm, self.updates)
        return norm, self.apply(norm)

    @property
    def gradient(self) -> torch.Tensor:
        """What is collected, flat."""
        assert self._master.grad is not None
        return self._master.grad

    def apply(self, norm: float) -> float:
        """Apply the collected gradient, clipped as part of one whose norm is `norm`, and clear it; returns the rate."""
        rate = self.learning_rate(self.updates)
        if norm > self.settings.max_grad_norm:
            self.gradient.mul_(self.settings.max_grad_norm / norm)
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self._write_back()
        self.gradient.zero_()
        self.updates += 1
        return rate

    def release(self) -> None:
        """Leave the parameters to another optimiser."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _write_back(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(self._views[name].view_as(parameter))

    def state(self) -> dict[str, torch.Tensor]:
        """Tensors from which `load_state` continues to the last bit."""
        moments = self._adam.state[self._master] if self._adam.state else {}
        zeros = torch.zeros_like(self._master)
        return {
            "master": self._master.detach(),
            "exp_avg": moments.get("exp_avg", zeros),
            "exp_avg_sq": moments.get("exp_avg_sq", zeros.clone()),
            "adam_step": torch.as_tensor(moments.get("step", 0.0), dtype=torch.float32),
            "updates": torch.tensor(self.updates),
        }

    def named_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """Master and moments of every parameter, flat, by its name."""
        state = self.state()
        sizes = [view.numel() for view in self._views.values()]
        keys = ("master", "exp_avg", "exp_avg_sq")
        parts = zip(*(state[key].split(sizes) for key in keys), strict=True)
        return {name: dict(zip(keys, part, strict=True)) for name, part in zip(self._views, parts, strict=True)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state()`; the parameters take the masters' values."""
        self._master.data.copy_(state["master"])
        self.updates = int(state["updates"])
        device = self._master.device
        self._adam.state[self._master] = {
            "step": state["adam_step"].clone().to(device),
            "exp_avg": state["exp_avg"].to(device, copy=True),
            "exp_avg_sq": state["exp_avg_sq"].to(device, copy=True),
        }
        self._write_back()


def scheduled_rate(settings: OptimizerSettings, total_updates: int, update: int) -> float:
    """The learning rate of optimiser step `update` (from 0) of `total_updates`."""
    warmup = settings.warmup_updates
    if update < warmup:
        return settings.learning_rate * (update + 1) / warmup
    gone = (update - warmup) / max(1, total_updates - warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - gone,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * gone)),
    }[settings.schedule]
    return settings.learning_rate * factor


def require_finite(norm: float, updates: int) -> None:
    """Refuse a gradient that no step can be made with.

    Args:
        norm: of the whole gradient.
        updates: optimiser steps made before.

    Raises:
        UserError: it is not finite.
    """
    if not math.isfinite(norm):
        raise UserError(f"the gradient of optimiser step {updates + 1} is not finite: the training diverged; "
                        "lower the learning rate and run again")  # fmt: skip


def _collector(gradient: torch.Tensor):
    def collect(parameter: nn.Parameter) -> None:
        if parameter.grad is not None:
            gradient.add_(parameter.grad.flatten())
            parameter.grad = None

    return collect
