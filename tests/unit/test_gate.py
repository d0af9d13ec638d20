"""The gate: every way to pass it and to be refused, and the sentence that says so."""

import pytest
from pydantic import ValidationError

from tuneloop.evaluation.accuracy import Comparison, compare, summarise
from tuneloop.evaluation.gate import decide
from tuneloop.evaluation.harness import GREEDY, Answer, ModelAnswers
from tuneloop.evaluation.settings import GateSettings, GuardSettings

DIGESTS = {"candidate": "c" * 64, "incumbent": "1" * 64}


def model(greedy: list[int], sampled: list[int] | None = None, samples: int = 4, **figures) -> ModelAnswers:
    """Answers of which `greedy[i]` is right or wrong and `sampled[i]` of `samples` are right."""

    def answer(prompt: int, sample: int, correct: bool) -> Answer:
        return Answer(
            prompt_id=f"p{prompt}",
            sample=sample,
            completion="x",
            tokens=figures.get("tokens", 5),
            truncated=prompt < figures.get("truncated", 0),
            correct=correct,
            reward=float(correct),
            parts={"exact": float(correct), "format": figures.get("form", 1.0)},
        )

    counts = sampled or [samples * right for right in greedy]
    return ModelAnswers(
        tuple(answer(i, GREEDY, bool(right)) for i, right in enumerate(greedy)),
        tuple(tuple(answer(i, s, s < right) for s in range(samples)) for i, right in enumerate(counts)),
    )


def judged(models: dict[str, ModelAnswers], settings: GateSettings | None = None, digests: dict | None = None):
    """The decision about real answers, as the evaluate step asks for it."""
    comparisons = [
        compare(models["candidate"], other, name, metric, 0.95)
        for name, other in models.items()
        if name != "candidate"
        for metric in ("accuracy", "pass_at_1")
    ]
    metrics = {name: summarise(answers, (1, 4), 0.95).metrics for name, answers in models.items()}
    return decide(comparisons, metrics, digests or DIGESTS, settings or GateSettings())


def test_figures_of_a_model():
    scores = summarise(model([1, 0, 1, 1], [4, 1, 2, 3], tokens=7, truncated=1, form=0.5), (2,), 0.95)
    assert scores.accuracy.value == 0.75
    assert scores.pass_at[1].value == (4 + 1 + 2 + 3) / 16
    # pass@2 of 4, 1, 2, 3 right ones among 4: 1, 1 - C(3,2)/C(4,2) = 1/2, 1 - 1/6, 1
    assert scores.pass_at[2].value == pytest.approx((1 + 1 / 2 + 5 / 6 + 1) / 4)
    assert scores.metrics == {"completion_tokens": 7.0, "truncated_share": 0.25, "exact": 0.75, "format": 0.5}


def test_comparison_of_two_models_on_both_metrics():
    candidate, base = model([1, 1, 1, 0], [4, 3, 2, 2]), model([1, 0, 0, 1], [4, 1, 0, 3])
    greedy = compare(candidate, base, "base", "accuracy", 0.95)
    assert (greedy.difference, greedy.wins, greedy.losses, greedy.n) == (0.25, 2, 1, 4)
    assert greedy.p_value == pytest.approx((3 + 1) / 8)  # P(Bin(3, 1/2) >= 2)
    sampled = compare(candidate, base, "base", "pass_at_1", 0.95)
    assert sampled.difference == pytest.approx((11 - 8) / 16)
    assert (sampled.wins, sampled.losses) == (2, 1)
    assert sampled.p_value == pytest.approx(2 / 8)  # |d| = 2, 2, 1: 5, 3, 1, 1, -1 …; observed 3: two of 8
    assert sampled.record()["ci95"] == list(sampled.interval)


def test_a_candidate_that_beats_the_base_passes_while_there_is_no_incumbent():
    decision = judged({"base": model([0] * 64), "candidate": model([1] * 60 + [0] * 4)})
    assert decision.passed
    assert decision.p_value == pytest.approx(2.0**-60)
    assert decision.reason == (
        "candidate 93.8 % accuracy beats base 0.0 % (+93.8 points, p = 8.7e-19); there is no incumbent yet"
    )
    assert [check.name for check in decision.checks] == ["beats base"]


def test_a_candidate_must_beat_the_incumbent_too_and_the_larger_p_value_counts():
    candidate, incumbent = model([1] * 60 + [0] * 4), model([1] * 40 + [0] * 24)
    decision = judged({"base": model([0] * 64), "incumbent": incumbent, "candidate": candidate})
    assert decision.passed
    assert decision.p_value == pytest.approx(2.0**-20)
    assert "and incumbent 62.5 % (+31.2 points, p = 9.5e-07)" in decision.reason
    assert "no incumbent" not in decision.reason


def test_a_gain_that_may_be_luck_is_refused():
    incumbent = model([1] * 57 + [0] * 7)
    decision = judged({"base": model([0] * 64), "incumbent": incumbent, "candidate": model([1] * 60 + [0] * 4)})
    assert not decision.passed
    assert decision.p_value == 0.125
    assert decision.reason == (
        "candidate 93.8 % is not proven better than incumbent 89.1 % (+4.7 points, p = 0.12: p is not under 0.01)"
    )
    assert [(check.name, check.passed) for check in decision.checks] == [
        ("beats base", True),
        ("beats incumbent", False),
    ]


def test_equal_answers_are_no_gain():
    same = model([1] * 32 + [0] * 32)
    decision = judged({"base": same, "candidate": same})
    assert not decision.passed
    assert decision.p_value == 1.0
    assert "no gain; p is not under 0.01" in decision.reason


def test_a_proven_gain_within_the_margin_is_refused():
    models = {"base": model([1] * 40 + [0] * 24), "candidate": model([1] * 50 + [0] * 14)}  # +15.6 points
    assert judged(models, GateSettings(margin=0.15)).passed
    refused = judged(models, GateSettings(margin=0.16))
    assert not refused.passed
    assert "not more than 16 points" in refused.reason


def test_significance_is_a_strict_bound():
    models = {"base": model([0] * 64), "candidate": model([1] * 3 + [0] * 61)}  # p = 1/8
    assert not judged(models, GateSettings(significance=0.125)).passed
    assert judged(models, GateSettings(significance=0.1251)).passed


def test_pass_at_1_can_be_the_primary_metric():
    models = {"base": model([1] * 64, [1] * 64), "candidate": model([1] * 64, [3] * 64)}
    assert not judged(models).passed
    decision = judged(models, GateSettings(primary="pass_at_1"))
    assert decision.passed
    assert decision.p_value == pytest.approx(2.0**-64)
    assert "75.0 % pass@1" in decision.reason


def test_the_incumbent_itself_is_refused_whatever_its_figures():
    models = {"base": model([0] * 64), "incumbent": model([0] * 64), "candidate": model([1] * 64)}
    decision = judged(models, digests={"candidate": "ab" * 32, "incumbent": "ab" * 32})
    assert not decision.passed
    assert decision.reason == "the candidate is the incumbent: same adapter digest abababababab"


def test_a_guard_compares_with_the_incumbent_or_else_with_the_base():
    good, settings = model([1] * 64, form=0.9), GateSettings(guards=(GuardSettings(metric="format", max_drop=0.05),))
    base, formal, informal = model([0] * 64, form=0.94), model([0] * 64, form=0.96), model([0] * 64, form=0.5)
    assert judged({"base": base, "candidate": good}, settings).passed
    assert judged({"base": formal, "incumbent": informal, "candidate": good}, settings).passed
    refused = judged({"base": base, "incumbent": formal, "candidate": good}, settings)
    assert not refused.passed
    assert refused.reason == "guard format: 0.9 against the incumbent's 0.96, a fall of more than 0.05"
    assert [check.passed for check in refused.checks] == [True, True, False]


def test_for_length_and_truncation_a_rise_is_what_hurts():
    guards = (
        GuardSettings(metric="completion_tokens", max_rise=3.0),
        GuardSettings(metric="truncated_share", max_rise=0.1),
    )
    settings, base = GateSettings(guards=guards), model([0] * 64, tokens=10, truncated=8)
    assert judged({"base": base, "candidate": model([1] * 64, tokens=2, truncated=0)}, settings).passed
    assert judged({"base": base, "candidate": model([1] * 64, tokens=13, truncated=14)}, settings).passed
    longer = judged({"base": base, "candidate": model([1] * 64, tokens=14, truncated=15)}, settings)
    assert "completion_tokens: 14 against the base's 10, a rise of more than 3" in longer.reason
    assert "truncated_share: 0.2344 against the base's 0.125, a rise of more than 0.1" in longer.reason
    with pytest.raises(ValidationError, match="needs `max_rise`"):
        GuardSettings(metric="completion_tokens")


def test_the_record_is_what_the_formats_say():
    record = judged({"base": model([0] * 64), "candidate": model([1] * 64)}).record()
    assert set(record) == {"passed", "reason", "p_value", "checks"}
    assert set(record["checks"][0]) == {"name", "passed", "detail"}


def test_a_p_value_too_small_for_a_float_is_said_so():
    sure = Comparison("base", "accuracy", 1.0, 0.0, (0.99, 1.0), 0.0, 2000, 2000, 0)
    decision = decide([sure], {"base": {}, "candidate": {}}, DIGESTS, GateSettings())
    assert "p < 1e-300" in decision.reason
