"""A name for what a model computes."""

import hashlib

import torch
from torch import nn


def weights_digest(model: nn.Module) -> str:
    """sha256 (hex) over every parameter's name, dtype, shape and bytes; parameters that are shared count once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        tensor = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
