"""Loading a causal language model and its tokenizer from a local folder."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tuneloop.errors import UserError
from tuneloop.models import attention
from tuneloop.models.fused import fuse
from tuneloop.models.quiet import no_progress_bars

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def default_device() -> torch.device:
    """The accelerator when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(folder: Path, dtype: str, device: torch.device | str | None = None) -> PreTrainedModel:
    """A frozen causal language model that attends by `tuneloop.models.attention`.

    Raises:
        UserError: the folder holds no causal language model that transformers can load, or it was damaged.
    """
    try:
        with no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=DTYPES[dtype], attn_implementation=attention.IMPLEMENTATION, local_files_only=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: cannot be loaded as a causal language model ({error})") from None
    fuse(model)
    model.to(torch.device(device or default_device()))  # pyright: ignore[reportArgumentType]  transformers wraps `to`
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder.

    Raises:
        UserError: the folder holds no tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: holds no tokenizer that transformers can load ({error})") from None
