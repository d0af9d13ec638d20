"""Where DeepSpeed's optimisers keep which part of a parameter's fp32 master and moments.

Each process holds flat fp32 tensors; a parameter's elements are one range of one of them, or none. DeepSpeed's own
`safe_set_full_*` would do for moments that exist and sizes that divide; a resumed run has neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Fragment:
    """The elements of one parameter that this process owns.

    Attributes:
        flat: the tensor that holds their masters; the optimiser's state is keyed by it.
        start: where they begin in `flat`.
        first: which element of the (flattened) parameter is the first.
        numel: how many.
    """

    flat: torch.Tensor
    start: int
    first: int
    numel: int

    @property
    def source(self) -> slice:
        """Their place in `flat`, and in moments like it."""
        return slice(self.start, self.start + self.numel)

    @property
    def place(self) -> slice:
        """Their place in the parameter."""
        return slice(self.first, self.first + self.numel)


def fragments(optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> dict[str, Fragment]:
    """The fragment of every parameter that the DeepSpeed optimiser trains, by name."""
    find = _stage_3 if hasattr(optimizer, "fp32_partitioned_groups_flat") else _stages_1_and_2
    trained = {name: parameter for name, parameter in parameters.items() if _is_trained(parameter)}
    return {name: find(optimizer, parameter) for name, parameter in trained.items()}


def _is_trained(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _stages_1_and_2(optimizer: Any, parameter: Any) -> Fragment:
    mapping = parameter._hp_mapping
    if mapping is None:
        return Fragment(optimizer.optimizer.param_groups[0]["params"][0], 0, 0, 0)
    flat = optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
    masters, elements = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Fragment(flat, masters.start, elements.start, elements.numel)


def _stage_3(optimizer: Any, parameter: Any) -> Fragment:
    group, start, numel = optimizer.grad_position[optimizer.get_param_id(parameter)]
    first = parameter.ds_zero_partition_rank * parameter.partition_numel()
    owned = max(0, min(numel, parameter.ds_numel - first))  # the last process's part may be filled up
    return Fragment(optimizer.fp32_partitioned_groups_flat[group], start, first if owned else 0, owned)


def write_back(optimizer: Any) -> None:
    """Give the parameters the values of their masters."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()  # what is whole would otherwise keep its old values
    for group in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
