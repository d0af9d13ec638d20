"""What a reward is, and the scorer that combines a task's rewards into one number."""

import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from tuneloop.errors import UserError
from tuneloop.settings import RewardSettings

if TYPE_CHECKING:
    from tuneloop.data.schema import Example

BUILDERS = {  # kind -> the module that holds its `build`; imported when first used, some are heavy
    "exact": "tuneloop.rewards.exact",
    "numeric": "tuneloop.rewards.numeric",
    "symbolic": "tuneloop.rewards.symbolic",
    "format": "tuneloop.rewards.format",
    "reasoning_gym": "tuneloop.rewards.reasoning_gym",
    "python": "tuneloop.rewards.python_function",
}


class Reward(Protocol):
    """Judges one completion of one example.

    Contract: returns a number in [0, 1], 1.0 meaning fully right; a pure function of its arguments, cheap to call
    (heavy things are loaded once, when the reward is built); whatever text a model produces gets a score and never an
    exception. `completion` is the decoded text without special tokens. An example that the reward cannot judge at all
    (it lacks the answer or the metadata that is needed) raises `CannotJudge`.
    """

    def __call__(self, example: "Example", completion: str) -> float:
        """The score of `completion`."""
        ...


class CannotJudge(UserError):
    """The example lacks what a reward needs, whatever the completion says."""


@dataclass(frozen=True)
class Score:
    """The rewards of one completion.

    Attributes:
        total: sum of weight × part over the task's rewards; what RL maximises.
        parts: reward name -> score in [0, 1].
        judge: name of the reward that decides whether the completion is correct.
    """

    total: float
    parts: dict[str, float]
    judge: str


class Scorer:
    """Scores completions with all rewards of a task."""

    def __init__(self, settings: Sequence[RewardSettings], rewards: Sequence[Reward]):
        self.settings = tuple(settings)
        self._rewards = dict(zip((one.name for one in settings), rewards, strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names, in the order of the config."""
        return tuple(self._rewards)

    def score(self, example: "Example", completion: str) -> Score:
        """Score one completion.

        A reward that cannot judge the example counts 0 where another reward is the example's judge: in a mix of
        sources, rows of one source carry what one reward needs and rows of another what another needs.

        Raises:
            UserError: a reward raised, or returned something that is not a number in [0, 1]; the message names the
                reward, the example and what happened.
        """
        judge = self.judge_of(example)
        parts = {}
        for name, reward in self._rewards.items():
            try:
                parts[name] = _checked(name, example, reward(example, completion))
            except CannotJudge as error:
                if name == judge:
                    raise UserError(f"reward {name!r} cannot judge example {example.id}: {error}") from error
                parts[name] = 0.0
            except UserError:
                raise
            except Exception as error:
                raise UserError(f"reward {name!r} failed on example {example.id}: {_describe(error)}") from error
        total = math.fsum(one.weight * parts[one.name] for one in self.settings)
        return Score(total=total, parts=parts, judge=judge)

    def is_correct(self, score: Score) -> bool:
        """Whether the judging reward gave full marks; partial credit is reward but not correctness."""
        return score.parts[score.judge] == 1.0

    def judge_of(self, example: "Example") -> str:
        """Name of the reward that decides correctness: the one whose name or kind is the example's `reward_kind`.

        An example that names none of the task's rewards is judged by the task's first one.
        """
        wanted = example.reward_kind
        if wanted in self._rewards:
            return wanted
        return next((one.name for one in self.settings if one.kind == wanted), self.settings[0].name)


def build_scorer(rewards: Sequence[RewardSettings]) -> Scorer:
    """The scorer of a task.

    Raises:
        UserError: a pattern that is no regular expression, a function that cannot be imported, a missing package.
    """
    return Scorer(rewards, [_builder(one.kind)(one) for one in rewards])


def _builder(kind: str) -> Callable[[RewardSettings], Reward]:
    return import_module(BUILDERS[kind]).build


def _checked(name: str, example: "Example", value: object) -> float:
    score = float(value) if isinstance(value, numbers.Real) else None  # numpy's scalars are numbers.Real too
    if score is None:
        problem = f"returned {value!r}, which is a {type(value).__name__} and not a number"
    elif not math.isfinite(score):
        problem = f"returned {score}"
    elif not 0.0 <= score <= 1.0:
        problem = f"returned {score}, outside [0, 1] (scale it; its importance is the setting `weight`)"
    else:
        return score
    raise UserError(f"reward {name!r} {problem} for example {example.id}")


def _describe(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (at {place.filename}:{place.lineno})"
