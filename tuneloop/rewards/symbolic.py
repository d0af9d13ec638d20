"""Symbolic match: the completion's expression is mathematically the answer, as math-verify judges it."""

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tuneloop.errors import UserError
from tuneloop.rewards.base import CannotJudge, Reward
from tuneloop.rewards.sandbox import Exhausted, shared_sandbox
from tuneloop.settings import RewardSettings

if TYPE_CHECKING:
    from tuneloop.data.schema import Example


def build(settings: RewardSettings) -> Reward:
    r"""A reward of 1.0 where the last expression of the completion equals the answer mathematically.

    Both may be LaTeX or plain text; `\boxed{…}` comes first, then `$…$`, then bare expressions and numbers. Comparing
    happens in a child process, and one that takes longer than `sandbox.CPU_SECONDS` counts as wrong.

    Raises:
        UserError: math-verify is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(f"reward {settings.name!r}: needs the package math-verify; install tuneloop[train]")
    sandbox = shared_sandbox(f"{__name__}:equivalent")

    def match(example: "Example", completion: str) -> float:
        try:
            verdict = sandbox.call(completion, example.answer)
        except Exhausted:
            return 0.0
        if verdict is None:
            raise CannotJudge(f"its answer {example.answer[:80]!r} is not an expression; write it as LaTeX or a number")
        return float(verdict)

    return match


def equivalent(completion: str, answer: str) -> bool | None:
    """Whether two texts hold the same expression; None if the answer holds none. Runs in the child process."""
    from math_verify import parse, verify

    expected = _parsed_answer(answer)
    if not expected:
        return None
    # The sandbox limits the time: math-verify's own limit raises a signal that C code does not see.
    return verify(expected, parse(completion, parsing_timeout=0), timeout_seconds=None)


@lru_cache(maxsize=4096)
def _parsed_answer(answer: str) -> list[Any]:
    import logging

    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    bare = answer.strip()
    marked = bare if "$" in bare or "\\boxed" in bare else f"${bare}$"  # LaTeX is only seen between marks
    return parse(marked, parsing_timeout=0) or parse(bare, parsing_timeout=0)
