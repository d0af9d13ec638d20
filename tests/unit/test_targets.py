"""Which modules get an adapter, by name."""

import pytest

from tuneloop.errors import UserError
from tuneloop.models.targets import choose_targets
from tuneloop.settings import LoraSettings

LINEAR = [
    f"model.layers.{n}.{part}" for n in (0, 1, 10) for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
]


def test_the_named_groups():
    assert choose_targets(LINEAR, LoraSettings()) == LINEAR
    assert choose_targets(LINEAR, LoraSettings(target_modules="mlp")) == [n for n in LINEAR if "mlp" in n]
    assert choose_targets(LINEAR, LoraSettings(target_modules="attention")) == [n for n in LINEAR if "attn" in n]


def test_patterns_match_the_end_of_a_name_on_a_dot():
    assert choose_targets(LINEAR, LoraSettings(target_modules=("0.self_attn.q_proj",))) == [LINEAR[0]]
    assert choose_targets(LINEAR, LoraSettings(target_modules=(r"layers\.1\d\.mlp\.up_proj",))) == [LINEAR[8]]


def test_exclusions_are_taken_away():
    chosen = choose_targets(LINEAR, LoraSettings(exclude_modules=("up_proj", r"layers\.0\..*")))
    assert chosen == [LINEAR[3], LINEAR[4], LINEAR[6], LINEAR[7]]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ("q_porj",)}, "lora.target_modules: 'q_porj' matches no"),
        ({"target_modules": ("[",)}, "lora.target_modules: '\\[' is no regular expression"),
        ({"exclude_modules": ("dwon_proj",)}, "lora.exclude_modules: 'dwon_proj' matches no"),
        ({"exclude_modules": (".*",)}, "matches no linear layer"),
        ({"rank_pattern": {"q_porj": 2}}, "lora.rank_pattern: 'q_porj' matches no"),
        ({"rank_pattern": {"[": 2}}, "lora.rank_pattern: '\\[' is no regular expression"),
        ({"alpha_pattern": {"gate_proj": 2.0}}, "lora.alpha_pattern: 'gate_proj' matches no"),
    ],
)
def test_a_pattern_that_does_nothing_is_refused(settings: dict, said: str):
    with pytest.raises(UserError, match=said):
        choose_targets(LINEAR, LoraSettings(**settings))
