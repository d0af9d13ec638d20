"""Content ids and the split that they decide."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneloop.data.identity import KEY_DIGITS, content_id, content_text, exact_text, split_of

SHARES = {"test_share": 0.1, "validation_share": 0.05}


def user(text: str) -> str:
    return content_id(("user",), (text,))


def test_spelling_decides_the_id_but_not_the_content_key():
    plain = user("What is 2 + 2?")
    assert plain == user("  What is\n2 + 2?\t")  # white space is not spelling
    for variant in ("what is 2+2", "WHAT IS 2 + 2 ?!", "„What“ is 2 × 2…", "What is ２ + 2?"):
        assert user(variant) != plain
        assert user(variant)[:KEY_DIGITS] == plain[:KEY_DIGITS]
    assert user("What is 2 + 3?")[:KEY_DIGITS] != plain[:KEY_DIGITS]
    assert content_text("Straße, ﬁn!") == "strassefin"
    assert exact_text("e\u0301 \r\n x") == "é x"


def test_the_system_message_is_part_of_the_id_but_not_of_the_content_key():
    bare, told = user("2 + 2"), content_id(("system", "user"), ("Be brief.", "2 + 2"))
    assert bare != told
    assert bare[:KEY_DIGITS] == told[:KEY_DIGITS]


def test_prompts_of_symbols_alone_are_told_apart():
    assert user("???") != user("!!!")
    assert user("???")[:KEY_DIGITS] != user("!!!")[:KEY_DIGITS]


def test_roles_and_message_borders_are_part_of_the_id():
    assert content_id(("user", "user"), ("a", "b")) != content_id(("user",), ("ab",))
    assert content_id(("user",), ("a",)) != content_id(("tool",), ("a",))


def test_a_lone_surrogate_is_refused():
    with pytest.raises(UnicodeEncodeError):
        user("broken \ud800 text")


@given(st.text(min_size=1, max_size=40), st.integers(0, 3))
def test_a_restyled_prompt_never_leaves_its_split(text, style):
    restyled = (text.swapcase().casefold(), f"  {text}\n", f"{text} ", "\n".join(text.split(" ")))[style]
    if content_text(text) and content_text(restyled) == content_text(text):
        assert split_of(user(restyled), **SHARES) == split_of(user(text), **SHARES)


def test_shares_are_met_and_the_borders_lie_where_they_should():
    splits = [split_of(user(f"question {number}"), **SHARES) for number in range(20_000)]
    assert 0.094 < splits.count("test") / 20_000 < 0.106  # 3 standard deviations: 0.0064
    assert 0.045 < splits.count("validation") / 20_000 < 0.055
    assert split_of("0" * 32, **SHARES) == "test"
    assert split_of("f" * 32, **SHARES) == "train"
    assert split_of("2" + "0" * 31, 0.125, 0.125) == "validation"  # 2/16: the first fraction beyond the test share
    assert split_of("4" + "0" * 31, 0.125, 0.125) == "train"
    assert split_of("0" * 32, 0.0, 0.0) == "train"
