"""The models that are compared: bases with adapters, answered one base at a time."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tuneloop.data.chat import render_prompts, require_chat_template
from tuneloop.data.schema import Example
from tuneloop.errors import UserError
from tuneloop.evaluation.harness import AnswerSettings, ModelAnswers, evaluate_model
from tuneloop.models.adapter_io import Adapter
from tuneloop.models.load import load_tokenizer, reserve_model
from tuneloop.rewards.base import Scorer
from tuneloop.rollout.build import build_engine
from tuneloop.rollout.engine import RolloutEngine
from tuneloop.rollout.torch_engine import TorchEngine


@dataclass(frozen=True)
class Contender:
    """A model that answers.

    Attributes:
        name: "base", "sft", "candidate" or "incumbent".
        base: folder of the model that is loaded.
        adapter: what is added to it; None for the bare base.
    """

    name: str
    base: Path
    adapter: Adapter | None = None

    @property
    def digest(self) -> str:
        """Equal for contenders over one base that compute the same; empty for the base itself."""
        return "" if self.adapter is None or self.adapter.is_no_op() else self.adapter.digest()

    @property
    def key(self) -> tuple[Path, str]:
        """Equal for contenders that compute the same."""
        return self.base, self.digest


Visit = Callable[[Contender, TorchEngine, PreTrainedTokenizerBase], None]


def answer_all(
    contenders: Sequence[Contender],
    examples: Sequence[Example],
    scorer: Scorer,
    settings: AnswerSettings,
    dtype: str,
    visit: Visit | None = None,
) -> dict[str, ModelAnswers]:
    """Every contender's answers to the same prompts, by name.

    A base is loaded once, and only one at a time; contenders that compute the same share their answers. Prompts are
    rendered by each base's own tokenizer. `visit` is called with each model that was not there yet, in the engine.

    Raises:
        UserError: a base cannot be loaded, an adapter does not fit its base, or a reward failed.
    """
    answers: dict[str, ModelAnswers] = {}
    for base in dict.fromkeys(contender.base for contender in contenders):
        members = [contender for contender in contenders if contender.base == base]
        answers |= _answer_over(base, members, examples, scorer, settings, dtype, visit)
        gc.collect()  # the engine is gone: give its weights back before the next base is loaded
    return {contender.name: answers[contender.name] for contender in contenders}


def _answer_over(
    base: Path,
    members: Sequence[Contender],
    examples: Sequence[Example],
    scorer: Scorer,
    settings: AnswerSettings,
    dtype: str,
    visit: Visit | None,
) -> dict[str, ModelAnswers]:
    tokenizer = load_tokenizer(base)
    require_chat_template(tokenizer)
    prompts = render_prompts(tokenizer, [example.messages for example in examples])
    engine = _engine(base, members, tokenizer, settings, dtype)
    answers: dict[str, ModelAnswers] = {}
    first_with: dict[str, str] = {}
    try:
        for contender in members:
            twin = first_with.setdefault(contender.digest, contender.name)
            if twin in answers:
                print(f"evaluate {contender.name}: computes the same as {twin}, so it answers the same", flush=True)
                answers[contender.name] = answers[twin]
                continue
            try:
                held = engine.sync(contender.adapter if contender.digest else None)
            except UserError as error:
                raise UserError(f"{contender.name}: {error}") from None
            if held != contender.digest:
                raise RuntimeError(
                    f"the engine holds adapter {held[:12]!r}, not {contender.name}'s {contender.digest[:12]!r}"
                )
            label = f"evaluate {contender.name}"
            answers[contender.name] = evaluate_model(engine, examples, prompts, scorer, tokenizer, settings, label)
            if visit and isinstance(engine, TorchEngine):
                visit(contender, engine, tokenizer)
    finally:
        engine.close()
    return answers


def _engine(
    base: Path, members: Sequence[Contender], tokenizer: PreTrainedTokenizerBase, settings: AnswerSettings, dtype: str
) -> RolloutEngine:
    """What answers for the members, one after the other; vLLM reads the weights itself."""
    if settings.engine.kind == "torch":
        return TorchEngine(base, dtype=dtype, max_sequences=settings.at_once)
    ranks = [a.shape[0] for member in members if member.adapter for a, _ in member.adapter.factors.values()]
    return build_engine(
        settings.engine.model_copy(update={"max_sequences": settings.at_once}),
        reserve_model(base, dtype),
        tokenizer,
        base_folder=base,
        dtype=dtype,
        max_length=settings.max_length,
        max_rank=max(ranks, default=1),
        sampling=settings.sampling,
        log=settings.log,
        section="evaluate",
    )
