"""Lets one model answer the held-out prompts, greedily and sampled, and scores the answers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tuneloop.data.schema import Example
from tuneloop.progress import Progress
from tuneloop.rewards.base import Scorer
from tuneloop.rollout.engine import Completion, RolloutEngine, SampleStream
from tuneloop.rollout.settings import EngineSettings
from tuneloop.settings import SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEDY = -1  # the `sample` of the most likely answer
EVALUATION_ROUND = 2**31  # of the sample stream; updates count from 1 and never reach it


@dataclass(frozen=True)
class Answer:
    """One scored completion.

    Attributes:
        prompt_id: the example's id.
        sample: 0, 1, … of the sampled ones, `GREEDY` of the most likely one.
        completion: decoded text without special tokens.
        tokens: new tokens, the end token included.
        truncated: cut off at the limit.
        correct: the judging reward gave full marks.
        reward: weighted total.
        parts: reward name -> score.
    """

    prompt_id: str
    sample: int
    completion: str
    tokens: int
    truncated: bool
    correct: bool
    reward: float
    parts: dict[str, float]


@dataclass(frozen=True)
class ModelAnswers:
    """What one model answered.

    Attributes:
        greedy: one answer a prompt, in the order of the prompts.
        sampled: `samples` answers a prompt, in the same order.
    """

    greedy: tuple[Answer, ...]
    sampled: tuple[tuple[Answer, ...], ...]

    def __iter__(self) -> Iterator[Answer]:
        yield from self.greedy
        for answers in self.sampled:
            yield from answers

    @property
    def samples(self) -> int:
        """Sampled answers a prompt."""
        return len(self.sampled[0])

    def correct_greedy(self) -> list[int]:
        """1 a prompt whose greedy answer is correct, else 0."""
        return [int(answer.correct) for answer in self.greedy]

    def correct_samples(self) -> list[int]:
        """How many of each prompt's sampled answers are correct."""
        return [sum(answer.correct for answer in answers) for answers in self.sampled]


@dataclass(frozen=True)
class AnswerSettings:
    """How models answer; the same for all that are compared.

    Attributes:
        samples: sampled completions a prompt.
        sampling: how they are drawn.
        max_new_tokens: limit of a completion.
        seed: of the sample stream; equal seeds give every model the same random numbers at the same place.
        at_once: completions asked of the engine in one call.
        engine: what samples.
        max_length: longest prompt with its completion, in tokens; read by vLLM alone.
        log: where vLLM's output goes.
    """

    samples: int
    sampling: SamplingSettings
    max_new_tokens: int
    seed: int
    at_once: int = 512
    engine: EngineSettings = field(default_factory=EngineSettings)
    max_length: int = 1024
    log: Path = Path("engine.log")


def evaluate_model(
    engine: RolloutEngine,
    examples: Sequence[Example],
    prompts: Sequence[Sequence[int]],
    scorer: Scorer,
    tokenizer: "PreTrainedTokenizerBase",
    settings: AnswerSettings,
    label: str = "evaluate",
) -> ModelAnswers:
    """Answer every prompt once greedily and `settings.samples` times sampled.

    Args:
        engine: holds the model (base and adapter) that answers.
        examples: what the prompts ask.
        prompts: token ids of each example's prompt.
        scorer: judges the completions.
        tokenizer: decodes them.
        settings: how they are drawn.
        label: shown with the progress.

    Raises:
        UserError: a reward failed.
    """
    judge = _Judge(examples, scorer, tokenizer)
    with Progress(label, len(prompts) * (1 + settings.samples)) as progress:
        ask = partial(_ask, engine, prompts, settings, judge, progress)
        greedy = ask(SamplingSettings(temperature=0.0), 1)
        sampled = ask(settings.sampling, settings.samples)
    return ModelAnswers(tuple(replace(answer, sample=GREEDY) for (answer,) in greedy), tuple(sampled))


def _ask(
    engine: RolloutEngine,
    prompts: Sequence[Sequence[int]],
    settings: AnswerSettings,
    judge: "_Judge",
    progress: Progress,
    sampling: SamplingSettings,
    samples: int,
) -> list[tuple[Answer, ...]]:
    """`samples` judged answers to every prompt, as many prompts in one call as `at_once` allows."""
    judged: list[tuple[Answer, ...]] = []
    at_once = max(1, settings.at_once // samples)
    for first in range(0, len(prompts), at_once):
        part = range(first, min(first + at_once, len(prompts)))
        groups = engine.generate(
            [prompts[i] for i in part],
            samples=samples,
            sampling=sampling,
            max_new_tokens=settings.max_new_tokens,
            stream=SampleStream(seed=settings.seed, round=EVALUATION_ROUND, prompt_indices=part),
        )
        judged += [judge(i, group) for i, group in zip(part, groups, strict=True)]
        progress.advance(len(part) * samples)
    return judged


@dataclass(frozen=True)
class _Judge:
    examples: Sequence[Example]
    scorer: Scorer
    tokenizer: "PreTrainedTokenizerBase"

    def __call__(self, prompt: int, group: Sequence[Completion]) -> tuple[Answer, ...]:
        """Decode and score one prompt's completions."""
        texts = self.tokenizer.batch_decode([made.token_ids for made in group], skip_special_tokens=True)
        example = self.examples[prompt]
        return tuple(self._answer(example, *made) for made in zip(range(len(group)), texts, group, strict=True))

    def _answer(self, example: Example, sample: int, text: str, made: Completion) -> Answer:
        score = self.scorer.score(example, text)
        return Answer(
            prompt_id=example.id,
            sample=sample,
            completion=text,
            tokens=len(made.token_ids),
            truncated=not made.finished,
            correct=self.scorer.is_correct(score),
            reward=score.total,
            parts=score.parts,
        )
