"""AdamW in several processes: DeepSpeed's ZeRO, stages 1 to 3, behind the same protocol as in one.

ZeRO (Rajbhandari et al., 2020, arXiv:1910.02054) spreads over the processes: stage 1 the fp32 masters and the moments,
stage 2 the gradients too, stage 3 the parameters too, those of the frozen base included. DeepSpeed does the spreading,
the sums and the gathering; schedule, clipping, the refusal of gradients that are not finite, and what a checkpoint
holds are those of `MasterAdamW`.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from tuneloop.errors import UserError
from tuneloop.models.lora_linear import LoraLinear
from tuneloop.models.sharding import TokenScorer, set_sharding
from tuneloop.settings import OptimizerSettings
from tuneloop.training.optim import MasterAdamW, require_finite, scheduled_rate
from tuneloop.training.settings import DistributedSettings
from tuneloop.training.zero_fragments import Fragment, fragments, write_back

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroAdamW:
    """An `Optimizer` whose state, and at stage 3 whose model, is spread over the processes of the default group.

    Parameters that are not the model's (value and partition heads) are small: every process holds them whole, and their
    gradients are summed.

    Args:
        model: with its adapter attached; at stage 3 its parameters are spread from here on until the process ends.
        parameters: (name, parameter) pairs, in a stable order.
        total_updates: the length of the schedule, in optimiser steps.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Iterable[tuple[str, nn.Parameter]],
        settings: OptimizerSettings,
        total_updates: int,
        distributed: DistributedSettings,
    ):
        self.settings, self.total_updates, self.updates = settings, total_updates, 0
        self.model, self._parameters = model, dict(parameters)
        self._world = torch.distributed.get_world_size()
        own = set(model.parameters())
        inside = [parameter for parameter in self._parameters.values() if parameter in own]
        outside = [(name, parameter) for name, parameter in self._parameters.items() if parameter not in own]
        for _, parameter in outside:  # a model that is to be spread waits in host memory, and they beside it
            parameter.data = parameter.data.to(self._device)
        self._sizes = {name: parameter.numel() for name, parameter in self._parameters.items()}
        self._replicated = MasterAdamW(outside, settings, total_updates) if outside else None
        self._outside = [name for name, _ in outside]
        self._adam_steps = 0
        self._inner = _ClippedAdamW(inside, settings)
        root = _Root(model)
        self._engine = _engine(root, inside, self._inner, distributed)
        self._inner.norm = lambda: self._norm()
        self._heads_norm = 0.0
        if distributed.zero_stage == 3:
            _announce_outside_uses(root)
            set_sharding(model, _Sharding(root, self._engine))

    def learning_rate(self, update: int) -> float:
        """The rate of optimiser step `update` (from 0)."""
        return scheduled_rate(self.settings, self.total_updates, update)

    def backward(self, loss: torch.Tensor) -> None:
        """See `Optimizer.backward`; from stage 2 on, every process makes as many calls as every other."""
        self._engine.optimizer.clear_backward_seen_flag()
        # The engine prepares when a gradient reaches the outputs of its own forward pass, which ours go around.
        self._engine._running_engine_backward = True
        self._engine._backward_prologue()
        self._engine.backward(loss * self._world, scale_wrt_gas=False)  # the engine averages

    def step(self) -> tuple[float, float]:
        """See `Optimizer.step`.

        Raises:
            UserError: the gradient is not finite; nothing was changed.
        """
        self._heads_norm = 0.0
        if self._replicated:
            torch.distributed.all_reduce(self._replicated.gradient)
            self._replicated.gradient.div_(self._world)  # `backward` has multiplied, for the engine
            self._heads_norm = float(torch.linalg.vector_norm(self._replicated.gradient))
            require_finite(self._heads_norm, self.updates)
        rate = self.learning_rate(self.updates)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        norm = self._norm()
        require_finite(norm, self.updates)  # the engine then made no step
        if self._replicated:
            self._replicated.apply(norm)
        self.updates += 1
        self._adam_steps += 1
        return norm, rate

    def _norm(self) -> float:
        return math.hypot(float(self._engine.optimizer._global_grad_norm), self._heads_norm)

    @torch.no_grad()
    def state(self) -> dict[str, torch.Tensor]:
        """The whole state in `MasterAdamW`'s layout, in the host memory of the first process; elsewhere empty.

        Gathered a parameter at a time; all processes call it together.
        """
        pieces: dict[str, list[torch.Tensor]] = {"master": [], **{name: [] for name in MOMENTS}}
        is_first = torch.distributed.get_rank() == 0
        own = fragments(self._engine.optimizer, self._parameters)
        heads = self._replicated.named_state() if self._replicated else {}
        for name, size in self._sizes.items():
            for key, parts in pieces.items():
                whole = heads[name][key] if name in heads else self._gathered(own[name], key, size)
                if is_first:
                    parts.append(whole.to("cpu", copy=True))
        if not is_first:
            return {}
        flat = {key: torch.cat(parts) for key, parts in pieces.items()}
        return {**flat, "adam_step": torch.tensor(float(self._adam_steps)), "updates": torch.tensor(self.updates)}

    def _gathered(self, fragment: Fragment, key: str, size: int) -> torch.Tensor:
        whole = torch.zeros(size, device=self._device)
        if fragment.numel:
            source = fragment.flat if key == "master" else self._inner.state.get(fragment.flat, {}).get(key)
            if source is not None:
                whole[fragment.place].copy_(source.detach()[fragment.source])
        torch.distributed.reduce(whole, dst=0)
        return whole

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from `state()`, which every process gives whole; the parameters take the masters' values."""
        own = fragments(self._engine.optimizer, self._parameters)
        sizes = list(self._sizes.values())
        flat = {key: dict(zip(self._sizes, state[key].split(sizes), strict=True)) for key in ("master", *MOMENTS)}
        self.updates = int(state["updates"])
        for name in self._parameters:
            if name in self._outside:
                continue
            fragment = own[name]
            if not fragment.numel:
                continue
            moments = self._inner.state[fragment.flat]
            moments["step"] = state["adam_step"].clone()
            fragment.flat[fragment.source].copy_(flat["master"][name][fragment.place])
            for key in MOMENTS:
                moments.setdefault(key, torch.zeros_like(fragment.flat))
                moments[key][fragment.source].copy_(flat[key][name][fragment.place])
        self._adam_steps = int(state["adam_step"])
        write_back(self._engine.optimizer)
        if self._replicated:
            part = {key: torch.cat([flat[key][name] for name in self._outside]) for key in flat}
            self._replicated.load_state({**part, "adam_step": state["adam_step"], "updates": state["updates"]})

    def release(self) -> None:
        """Leave the parameters to another optimiser; at stage 3 they stay spread."""
        if self._replicated:
            self._replicated.release()
        self._engine.destroy()
        set_sharding(self.model, None)


class _ClippedAdamW(torch.optim.AdamW):
    """What steps inside DeepSpeed: clips by the norm of everything that is trained, of which DeepSpeed sees a part."""

    def __init__(self, parameters: list[nn.Parameter], settings: OptimizerSettings):
        super().__init__(
            parameters,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.limit = settings.max_grad_norm
        self.norm: Callable[[], float] = lambda: 0.0

    def step(self, closure=None):  # type: ignore[override]
        norm = self.norm()
        if norm > self.limit:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self.limit / norm)
        return super().step(closure)


class _Root(nn.Module):
    """What DeepSpeed wraps: the model and what uses its head. A forward pass is whatever it is called with."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.scorer = TokenScorer(model.get_output_embeddings())

    def forward(self, run: Callable[[], None]) -> None:
        """Run it."""
        run()


class _Sharding:
    """See `tuneloop.models.sharding.Sharding`."""

    def __init__(self, root: _Root, engine: Any):
        self._root, self._engine = root, engine
        self.scorer = root.scorer

    def run(self, forward: Callable[[], T]) -> T:
        """A forward pass inside the root's, whose hooks begin a new round of gathering."""
        results: list[T] = []
        self._root(lambda: results.append(forward()))
        if not torch.is_grad_enabled():
            self._release()
        return results[0]

    def _release(self) -> None:
        """Spread what was put together, or is on its way, for the backward pass that does not follow."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        parameters: list[Any] = list(self._root.parameters())
        self._engine.optimizer.parameter_offload.get_param_coordinator()._clean_inflight_param_registry()
        for parameter in parameters:
            if parameter.ds_status == ZeroParamStatus.AVAILABLE and not parameter.ds_persist:
                parameter.ds_active_sub_modules.clear()
                parameter.partition()


def _announce_outside_uses(root: _Root) -> None:
    """Tell DeepSpeed which modules compute with another module's parameters."""
    from deepspeed.runtime.zero.partition_parameters import register_external_parameter

    register_external_parameter(root.scorer, root.scorer.weight)
    for module in root.model.modules():
        if isinstance(module, LoraLinear):
            for parameter in module.base.parameters(recurse=False):
                register_external_parameter(module, parameter)


def _engine(root: _Root, parameters: list[nn.Parameter], inner: _ClippedAdamW, settings: DistributedSettings) -> Any:
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # what DeepSpeed calls
    # DeepSpeed would compile an all-reduce in shared memory for the CPU: 100 s and a compiler, where gloo's does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    dtype = parameters[0].dtype
    if dtype not in (torch.bfloat16, torch.float32):
        raise UserError(f"model.dtype {dtype} cannot be trained in several processes; use bfloat16 or float32")
    elements = sum(parameter.numel() for parameter in parameters)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,  # step() is the boundary
        "gradient_clipping": 0.0,  # `_ClippedAdamW` clips
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_config(settings, elements),
    }
    engine, *_ = deepspeed.initialize(
        model=root,
        model_parameters=parameters,  # pyright: ignore[reportArgumentType]  its annotation is wrong
        optimizer=inner,
        config=config,
        dist_init_required=False,
    )
    return engine


def _zero_config(settings: DistributedSettings, elements: int) -> dict[str, Any]:
    bucket = max(1, min(elements, settings.bucket_elements))
    config: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket + bucket % 2,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
    }
    if settings.offload_optimizer:
        config["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if settings.zero_stage == 3:
        config["stage3_param_persistence_threshold"] = settings.whole_below
        config["stage3_prefetch_bucket_size"] = settings.bucket_elements
        # By default 10^9 elements stay whole from a layer's forward to its backward pass, or behind a lone forward.
        config["stage3_max_reuse_distance"] = 0
        if settings.offload_parameters:
            config["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return config
