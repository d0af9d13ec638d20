"""Loading a causal language model and its tokenizer from a local folder.

Legend: T tokens, V vocabulary, D hidden size.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tuneloop.errors import UserError
from tuneloop.models import attention
from tuneloop.models.forward import head_weight, hidden_states
from tuneloop.models.fused import fuse
from tuneloop.models.packed import pack
from tuneloop.models.quiet import no_progress_bars

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_PROBE = [7, 11, 3, 19, 5, 13, 2, 17]  # token ids that every vocabulary has
_TOLERANCES = {"bfloat16": 0.1, "float16": 0.02, "float32": 1e-3}  # nats, mean KL of two right computations


def default_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(folder: Path, dtype: str, device: torch.device | str | None = None) -> PreTrainedModel:
    """A frozen causal language model that attends by `tuneloop.models.attention`.

    Raises:
        UserError: the folder holds no causal language model that transformers can load, it is damaged or incomplete, or
            it computes its logits in a way that `forward.score` does not.
    """
    try:
        with no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES[dtype], local_files_only=True, output_loading_info=True
            )
            model, report = loaded
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded as a causal language model ({error})") from None
    if report["missing_keys"]:
        raise UserError(f"{folder}: lacks the weights {sorted(report['missing_keys'])[0]}; fetch the model again")
    model.to(torch.device(device or default_device()))  # pyright: ignore[reportArgumentType]  transformers wraps `to`
    model.eval().requires_grad_(False)
    expected_TV = _plain_logprobs(model)
    model.set_attn_implementation(attention.IMPLEMENTATION)
    fuse(model)
    divergence = float((expected_TV.exp() * (expected_TV - _our_logprobs(model))).sum(-1).mean())
    if not divergence <= _TOLERANCES[dtype]:
        name = type(model).__name__
        raise UserError(f"{folder}: {name} is not supported: its distributions come out {divergence:.2g} nats off "
                        "(a head that scales, caps or shifts its logits?); use a Llama or Qwen model")  # fmt: skip
    return model


def reserve_model(folder: Path, dtype: str) -> PreTrainedModel:
    """`load_model` without reading any weight: they hold nothing, and the host's memory is taken when they are written.

    For the processes that get their share of the weights from the first one, which has loaded and checked them.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    model.tie_weights()
    reserved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in reserved:  # a tied weight stays one
                reserved[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            module.register_parameter(name, reserved[id(parameter)])
    model.eval()
    model.set_attn_implementation(attention.IMPLEMENTATION)
    fuse(model)
    return model


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Keep the input of each decoder layer alone in training, and compute the layer again in the backward pass."""
    model.gradient_checkpointing_enable({"use_reentrant": False})


@torch.no_grad()
def _plain_logprobs(model: PreTrainedModel) -> torch.Tensor:
    """Log-probs (T, V) behind the probe's tokens by transformers' own forward pass."""
    model.set_attn_implementation("eager")
    return model(torch.tensor([_PROBE], device=model.device), use_cache=False).logits[0, :-1].float().log_softmax(-1)


@torch.no_grad()
def _our_logprobs(model: PreTrainedModel) -> torch.Tensor:
    batch = pack([(_PROBE[:4], [_PROBE[4:]])], model.device)
    hidden_TD = hidden_states(model, batch.input_ids_T, batch.position_ids_T, batch)
    return F.linear(hidden_TD, head_weight(model)).float().log_softmax(-1)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        UserError: the folder holds no tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: holds no tokenizer that transformers can load ({error})") from None
