"""What a model's answers amount to: accuracy, pass@k and means, each with its interval; and two models compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tuneloop.evaluation.harness import ModelAnswers
from tuneloop.evaluation.statistics import (
    Estimate,
    Interval,
    mean_estimate,
    paired_difference_interval,
    pass_at_k_estimate,
    sign_flip_test,
)

Metric = Literal["accuracy", "pass_at_1"]


@dataclass(frozen=True)
class ModelScores:
    """One model's figures on the held-out prompts.

    Attributes:
        accuracy: share of prompts whose greedy answer is correct.
        pass_at: k -> estimated chance that one of k sampled answers is correct; 1 is always there.
        metrics: means over the greedy answers: `completion_tokens`, `truncated_share`, and each reward by name.
    """

    accuracy: Estimate
    pass_at: dict[int, Estimate]
    metrics: dict[str, float]

    def value(self, metric: Metric) -> float:
        """The estimate of a primary metric."""
        return self.accuracy.value if metric == "accuracy" else self.pass_at[1].value

    def record(self) -> dict[str, Any]:
        """The model's entry in `evaluation.json`."""
        return {
            "accuracy": _record(self.accuracy),
            "pass_at": {str(k): _record(estimate) for k, estimate in self.pass_at.items()},
            "metrics": self.metrics,
        }


@dataclass(frozen=True)
class Comparison:
    """The candidate against another model on the same prompts.

    Attributes:
        reference: the other model's name.
        metric: what is compared.
        candidate_value, reference_value: the two means.
        interval: of their difference.
        p_value: one-sided, of the candidate being better: exact sign-flip test, on binary outcomes exact McNemar.
        n: prompts.
        wins, losses: prompts on which the candidate does better, worse.
    """

    reference: str
    metric: Metric
    candidate_value: float
    reference_value: float
    interval: Interval
    p_value: float
    n: int
    wins: int
    losses: int

    @property
    def difference(self) -> float:
        """Candidate minus reference."""
        return self.candidate_value - self.reference_value

    def record(self) -> dict[str, Any]:
        """The comparison's entry in `evaluation.json`."""
        return {
            "reference": self.reference,
            "metric": self.metric,
            "difference": self.difference,
            "ci95": list(self.interval),
            "p_value": self.p_value,
            "n": self.n,
            "wins": self.wins,
            "losses": self.losses,
        }


def summarise(answers: ModelAnswers, pass_k: Sequence[int], confidence: float) -> ModelScores:
    """The figures of one model's answers."""
    greedy = answers.greedy
    correct = answers.correct_samples()
    metrics = {
        "completion_tokens": sum(answer.tokens for answer in greedy) / len(greedy),
        "truncated_share": sum(answer.truncated for answer in greedy) / len(greedy),
    }
    for name in greedy[0].parts:
        metrics[name] = sum(answer.parts[name] for answer in greedy) / len(greedy)
    return ModelScores(
        accuracy=mean_estimate(answers.correct_greedy(), 1, confidence),
        pass_at={k: pass_at_k_estimate(correct, answers.samples, k, confidence) for k in sorted({1, *pass_k})},
        metrics=metrics,
    )


def compare(
    candidate: ModelAnswers, reference: ModelAnswers, name: str, metric: Metric, confidence: float
) -> Comparison:
    """The candidate against the model `name`, prompt by prompt."""
    if metric == "accuracy":
        ours, theirs, trials = candidate.correct_greedy(), reference.correct_greedy(), 1
    else:
        ours, theirs, trials = candidate.correct_samples(), reference.correct_samples(), candidate.samples
    differences = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    n = len(differences)
    return Comparison(
        reference=name,
        metric=metric,
        candidate_value=sum(ours) / (n * trials),
        reference_value=sum(theirs) / (n * trials),
        interval=paired_difference_interval(
            [count / trials for count in ours], [count / trials for count in theirs], trials, confidence
        ),
        p_value=sign_flip_test(differences)[0],
        n=n,
        wins=sum(difference > 0 for difference in differences),
        losses=sum(difference < 0 for difference in differences),
    )


def _record(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "n": estimate.n, "ci95": list(estimate.interval)}
