"""Loading a tokenizer, and counting tokens fast."""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from tuneloop.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_TEXTS = 1024  # texts encoded at once: enough for every core, and their tokens stay a few megabytes

_PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder, without importing torch where that is possible.

    Raises:
        UserError: the folder holds no tokenizer that can be loaded.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        plain = settings.get("tokenizer_class") in _PLAIN_CLASSES and "auto_map" not in settings
    except (OSError, ValueError, AttributeError):
        plain = False
    try:
        if plain:
            # The class that AutoTokenizer would choose; AutoTokenizer itself imports torch, 270 MB and 2 s.
            return PreTrainedTokenizerFast.from_pretrained(folder)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: the tokenizer cannot be loaded ({error})") from None


class TokenCounter:
    """Counts the tokens of texts in a thread of its own: the tokenizer runs outside the interpreter lock.

    Use as a context manager.

    Args:
        tokenizer: a fast tokenizer is used without offsets and special tokens; any other one through its call.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self._encode: Any = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            backend.no_truncation()
            backend.no_padding()
            self._encode = backend.encode_batch_fast
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def __enter__(self) -> "TokenCounter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._pool.shutdown(cancel_futures=True)

    def submit(self, texts: Sequence[str]) -> "Future[np.ndarray]":
        """Begin counting; the result is (N,) int32."""
        return self._pool.submit(self.count, texts)

    def count(self, texts: Sequence[str]) -> np.ndarray:
        """Tokens of each text (N,) int32; special tokens count where they stand in the text, none are added."""
        counts = np.empty(len(texts), np.int32)
        for start in range(0, len(texts), CHUNK_TEXTS):
            chunk = list(texts[start : start + CHUNK_TEXTS])
            if self._encode is not None:
                encoded = self._encode(chunk, add_special_tokens=False)
            else:
                encoded = self._tokenizer(chunk, add_special_tokens=False)["input_ids"]
            counts[start : start + len(chunk)] = [len(tokens) for tokens in encoded]  # type: ignore[arg-type]
        return counts
