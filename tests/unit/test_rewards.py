"""Rewards: what counts as right, what a scorer refuses, and that no completion can hang it."""

import json
import math
import os
import signal
import threading
import time
from fractions import Fraction

import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from tuneloop.data.schema import Example
from tuneloop.errors import TryAgain, UserError
from tuneloop.rewards.base import build_scorer
from tuneloop.rewards.numeric import last_number
from tuneloop.rewards.sandbox import Exhausted, Sandbox, SandboxError
from tuneloop.settings import RewardSettings


def example(answer: str, metadata: dict | None = None, reward_kind: str = "") -> Example:
    return Example(
        id="row-7",
        messages=[{"role": "user", "content": "?"}],
        answer=answer,
        completion=answer,
        reward_kind=reward_kind,
        metadata=metadata or {},
    )


def score(kind: str, answer: str, completion: str, **options) -> float:
    return build_scorer([RewardSettings(kind=kind, **options)]).score(example(answer), completion).total


def entry(data_set: str, **options) -> dict:
    """A reasoning-gym entry as data preparation stores it: through JSON."""
    return json.loads(json.dumps(reasoning_gym.create_dataset(data_set, size=1, seed=3, **options)[0], default=str))


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        ("Paris", "  Paris\n", 1.0),
        ("Paris", "paris", 0.0),
        ("Paris", "Paris.", 0.0),
        ("caf\u00e9", "cafe\u0301", 1.0),
        ("a b", "a  b", 0.0),
    ],
)
def test_exact_match_ignores_only_surrounding_space_and_unicode_spelling(answer, completion, expected):
    assert score("exact", answer, completion) == expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12", 12),
        ("The answer is 12.", 12),
        ("5-3", 3),
        ("5 - 3", 3),
        ("= -3", -3),
        ("\u22127", -7),
        ("-$5", -5),
        ("$-5", -5),
        ("costs $1,234.50 now", Fraction("1234.5")),
        ("1,2,3", 3),
        (r"1{,}234", 1234),
        (r"\$1\,000", 1000),
        ("50%", 50),
        (r"50\%", 50),
        ("it is 3/4.", Fraction(3, 4)),
        ("5 - 3/4", Fraction(3, 4)),
        (r"\boxed{-\frac{1}{2}} and 9", Fraction(-1, 2)),
        (r"2\frac{1}{2}", Fraction(1, 2)),
        (r"\boxed{3} no, \boxed{4}", 4),
        ("17 apples #### 1,000 of 3", 1000),
        ("x=.5", Fraction(1, 2)),
        ("1.5e3", 1500),
        ("0/5", 0),
    ],
)
def test_the_number_of_a_text(text, number):
    found = last_number(text)
    assert found is not None
    assert Fraction(found) == number


@pytest.mark.parametrize("text", ["", "none", "1/0", "####", r"\boxed{} 4"])
def test_texts_without_a_number(text):
    assert last_number(text) is None


def test_numeric_match_is_exact_for_whole_numbers_and_relative_for_others():
    assert score("numeric", "1000000", "1000001") == 0.0  # within a relative 1e-6, and still another whole number
    assert score("numeric", "1000000", "1,000,000.0") == 1.0
    assert score("numeric", "0.3333333", "1/3") == 1.0  # off by a relative 1e-7
    assert score("numeric", "0.33333", "1/3") == 0.0  # off by a relative 1e-5
    assert score("numeric", "0", "-0.0") == 1.0
    assert score("numeric", "10000000000000000000001", "10000000000000000000002") == 0.0  # equal as floats


def test_numeric_match_needs_a_number_in_the_answer():
    with pytest.raises(UserError, match=r"'numeric'.*row-7.*'blue' holds no number"):
        score("numeric", "blue", "3")


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_is_read_as_it_was_written(value):
    assert last_number(f"so the total is {value:,}.") == value


@pytest.mark.parametrize("text", ["(" * 50_000, "1," * 50_000, r"\frac{" * 20_000, "1" * 100_000, "$ " * 50_000])
def test_long_nonsense_is_read_fast(text):
    started = time.perf_counter()
    score("numeric", "12", text)
    assert time.perf_counter() - started < 2.0


@pytest.mark.parametrize(
    ("answer", "completion", "expected"),
    [
        (r"\frac{1}{2}", "so it is 0.5", 1.0),
        ("x^2+2x+1", "$(x+1)^2$", 1.0),
        (r"\sqrt{8}", r"$2\sqrt2$", 1.0),
        ("3", r"first 3, but \boxed{4}", 0.0),
        ("3", "", 0.0),
        ("7", "((((", 0.0),
    ],
)
def test_symbolic_match(answer, completion, expected):
    assert score("symbolic", answer, completion) == expected


def test_symbolic_match_survives_an_expression_that_never_ends_also_in_a_thread():
    scorer = build_scorer([RewardSettings(kind="symbolic")])
    scores = []

    def work():
        scores.append(scorer.score(example("7"), "$9^{9^{9^{9}}}$").total)
        scores.append(scorer.score(example("7"), "$14/2$").total)  # the sandbox is there again

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=30)
    assert scores == [0.0, 1.0]


def test_format_matches_the_whole_completion():
    options = {"pattern": r"(?s)<think>.*</think>\s*\d+"}
    assert score("format", "4", "<think>2+2\nis</think>\n4", **options) == 1.0
    assert score("format", "4", "<think>2+2</think> 4 and more", **options) == 0.0
    with pytest.raises(UserError, match=r"'format'.*'\(' is not a regular expression"):
        build_scorer([RewardSettings(kind="format", pattern="(")])


def test_reasoning_gym_judges_an_answer_tag_or_the_whole_text():
    row = entry("chain_sum")
    scorer = build_scorer([RewardSettings(kind="reasoning_gym")])
    right = example(row["answer"], row)
    for completion in (row["answer"], f" {row['answer']}\n", f"well … <answer> {row['answer']} </answer> so"):
        assert scorer.is_correct(scorer.score(right, completion))
    partial = scorer.score(right, f"it is {row['answer']}")  # chain_sum: len(answer) / len(completion)
    assert partial.total == pytest.approx(len(row["answer"]) / len(f"it is {row['answer']}"))
    assert not scorer.is_correct(partial)


def test_reasoning_gym_restores_what_json_lost():
    row = entry("rearc")  # its scorer compares with tuples, and JSON knows lists only
    scorer = build_scorer([RewardSettings(kind="reasoning_gym")])
    assert scorer.score(example(row["answer"], row), row["answer"]).total == 1.0
    assert scorer.score(example(row["answer"], row), "0 0\n0 0").total < 1.0


def test_reasoning_gym_counts_a_completion_that_crashes_the_scorer_as_wrong():
    row = entry("prime_factorization")
    scorer = build_scorer([RewardSettings(kind="reasoning_gym")])
    assert scorer.score(example(row["answer"], row), "junk ((").total == 0.0


def test_reasoning_gym_names_what_a_row_lacks():
    scorer = build_scorer([RewardSettings(kind="reasoning_gym")])
    with pytest.raises(UserError, match=r"'reasoning_gym'.*row-7.*no reasoning-gym entry"):
        scorer.score(example("4"), "4")
    row = {"question": "?", "answer": "4", "metadata": {"source_dataset": "chain_summ"}}
    with pytest.raises(UserError, match="no data set 'chain_summ'"):
        scorer.score(example("4", row), "4")
    broken = {"question": "?", "answer": "{}", "metadata": {"source_dataset": "boxnet"}}
    with pytest.raises(UserError, match=r"row-7: .*KeyError"):
        scorer.score(example("{}", broken), "{}")


def shorter_is_better(completion: str, answer: str, metadata: dict) -> float:
    return 1.0 / (1 + len(completion))


def returns_what_metadata_says(completion: str, answer: str, metadata: dict) -> object:
    if "raises" in metadata:
        raise KeyError(metadata["raises"])
    return metadata["value"]


def python_reward(function: str) -> RewardSettings:
    return RewardSettings(kind="python", function=function, name="mine")


def test_a_users_function_is_called_with_completion_answer_and_metadata():
    scorer = build_scorer([python_reward(f"{__name__}:shorter_is_better")])
    assert scorer.score(example("4"), "abc").total == 0.25


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_such_package.rewards:score", "No module named 'no_such_package'"),
        ("math:no_such_function", "math has no 'no_such_function'"),
        ("math:pi", "is a float, which cannot be called"),
    ],
)
def test_a_function_that_does_not_exist_is_refused_when_built(function, message):
    with pytest.raises(UserError, match=message):
        build_scorer([python_reward(function)])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"value": math.nan}, "returned nan for example row-7"),
        ({"value": math.inf}, "returned inf for example row-7"),
        ({"value": 1.5}, r"returned 1.5, outside \[0, 1\]"),
        ({"value": "good"}, "returned 'good', which is a str and not a number"),
        ({"value": None}, "returned None"),
        ({"raises": "gold"}, r"'mine' failed on example row-7: KeyError: 'gold' \(at .*test_rewards.py:\d+\)"),
    ],
)
def test_a_reward_that_misbehaves_is_named(metadata, message):
    scorer = build_scorer([python_reward(f"{__name__}:returns_what_metadata_says")])
    with pytest.raises(UserError, match=message):
        scorer.score(example("4", metadata), "4")
    assert scorer.score(example("4", {"value": True}), "4").total == 1.0


def test_the_total_is_the_weighted_sum_and_the_first_reward_judges():
    scorer = build_scorer(
        [
            RewardSettings(kind="numeric", weight=1.0),
            RewardSettings(kind="format", pattern=r"\d+", weight=0.25),
            RewardSettings(kind="format", name="short", pattern=".{0,2}", weight=-0.5),
        ]
    )
    wordy = scorer.score(example("42"), "it is 42")
    assert wordy.parts == {"numeric": 1.0, "format": 0.0, "short": 0.0}
    assert wordy.total == 1.0  # 1·1 + 0.25·0 - 0.5·0
    assert scorer.is_correct(wordy)
    wrong = scorer.score(example("42"), "41")
    assert wrong.total == -0.25  # 1·0 + 0.25·1 - 0.5·1
    assert not scorer.is_correct(wrong)


def test_a_row_is_judged_by_the_reward_that_it_names_by_name_or_kind():
    scorer = build_scorer([RewardSettings(kind="numeric"), RewardSettings(kind="exact", name="verbatim")])
    for reward_kind, correct in (("", True), ("numeric", True), ("verbatim", False), ("exact", False), ("other", True)):
        result = scorer.score(example("42", reward_kind=reward_kind), "it is 42")
        assert scorer.is_correct(result) is correct, reward_kind


def test_in_a_mix_of_sources_a_reward_that_cannot_judge_a_row_counts_zero():
    scorer = build_scorer([RewardSettings(kind="reasoning_gym"), RewardSettings(kind="exact")])
    result = scorer.score(example("blue", reward_kind="exact"), "blue")
    assert result.parts == {"reasoning_gym": 0.0, "exact": 1.0}
    assert scorer.is_correct(result)


ECHO = "copy:copy"


def test_a_sandbox_gives_back_results_and_errors():
    sandbox = Sandbox(ECHO)
    assert sandbox.call({"a": [1, "é\n"]}) == {"a": [1, "é\n"]}
    with pytest.raises(SandboxError, match="TypeError"):
        sandbox.call()
    assert sandbox.call(3) == 3


def test_a_scorer_that_prints_does_not_disturb_the_answers():
    sandbox = Sandbox("builtins:print")
    assert [sandbox.call("noise"), sandbox.call("noise")] == [None, None]


def test_a_sandbox_ends_a_call_that_takes_too_long_or_too_much_memory():
    sandbox = Sandbox("operator:pow", cpu_seconds=0.2)
    with pytest.raises(Exhausted):
        sandbox.call(9, 9**9)
    assert sandbox.call(9, 2) == 81
    with pytest.raises(Exhausted):
        Sandbox("builtins:bytearray").call(2**33)


def test_a_sandbox_that_something_else_killed_means_try_again():
    sandbox = Sandbox(ECHO)
    sandbox.call(1)
    os.kill(sandbox._child.pid, signal.SIGKILL)
    with pytest.raises(TryAgain, match="killed from outside"):
        sandbox.call(1)
    assert sandbox.call(1) == 1


def test_a_sandbox_ends_with_its_owner_object():
    sandbox = Sandbox(ECHO)
    sandbox.call(1)
    child = sandbox._child.pid
    del sandbox
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_forked_process_starts_a_sandbox_of_its_own():
    sandbox = Sandbox(ECHO)
    sandbox.call(1)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if sandbox.call(2) == 2 and sandbox._owner == os.getpid() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sandbox.call(3) == 3
