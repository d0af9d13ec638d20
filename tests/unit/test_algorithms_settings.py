"""What a config may say of an algorithm: defaults by name, and refusals that give the reason."""

import json
from pathlib import Path
from typing import get_args

import pytest

from components.config import RunConfig, load_run_config
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.table import ALGORITHMS
from tuneloop.algorithms.traits import SPECIAL_SETTINGS, TRAITS, AlgorithmName
from tuneloop.config import load_config, parse_config, resolved_json
from tuneloop.errors import UserError

CI = Path(__file__).resolve().parents[2] / "configs" / "ci.toml"


def run_config(*settings: str) -> RunConfig:
    return load_run_config(CI, ("lora_rl.algorithm.minibatches=1", *(f"lora_rl.algorithm.{s}" for s in settings)))


def test_every_name_has_an_algorithm_and_traits():
    assert set(get_args(AlgorithmName)) == set(ALGORITHMS) == set(TRAITS)
    for name, traits in TRAITS.items():
        assert traits.reads <= SPECIAL_SETTINGS
        assert traits.holds_reference == ALGORITHMS[name].needs_reference


DEFAULTS = {
    "grpo": {"clip_low": 0.2, "clip_high": 0.2, "aggregation": "token_mean", "correction": "token", "dual_clip": 0.0},
    "dr_grpo": {"aggregation": "sequence_mean_sum_norm", "length_norm": 4},
    "rloo": {"aggregation": "sequence_mean_sum_norm", "length_norm": 4},
    "reinforce": {"aggregation": "sequence_mean_sum_norm", "kl_in": "reward", "kl_estimator": "k1"},
    "reinforce_pp": {"kl_in": "reward", "kl_estimator": "k1"},
    "reinforce_pp_baseline": {"kl_in": "loss", "kl_estimator": "k2"},
    "ppo": {"dual_clip": 3.0, "kl_in": "reward", "kl_estimator": "k1"},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "aggregation": "token_mean", "dynamic_sampling": True},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean", "correction": "sequence"},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0},
    "flowrl": {"aggregation": "sequence_mean", "correction": "none", "flow_beta": 15.0},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_follow_the_name_and_show_up_resolved(name: str, tmp_path: Path):
    config = run_config(f"name={name}")
    found = config.lora_rl.algorithm.model_dump()
    assert {key: found[key] for key in DEFAULTS[name]} == DEFAULTS[name]
    (tmp_path / "resolved.json").write_text(resolved_json(config))
    assert load_config(RunConfig, tmp_path / "resolved.json") == config
    assert json.loads((tmp_path / "resolved.json").read_text())["lora_rl"]["algorithm"] == found


def test_what_is_said_wins_over_the_name():
    assert run_config("name=gspo", "clip_low=0.1").lora_rl.algorithm.clip_low == 0.1
    assert run_config("name=dr_grpo", "length_norm=7").lora_rl.algorithm.length_norm == 7
    assert run_config("name=ppo", "kl_in=loss", "kl_coefficient=0.1").lora_rl.algorithm.kl_estimator == "k3"
    assert run_config("kl_in=reward", "kl_coefficient=0.1").lora_rl.algorithm.kl_estimator == "k1"


def test_dapo_penalises_the_last_fifth():
    long = ("task.max_new_tokens=20", "lora_rl.algorithm.name=dapo")
    assert load_run_config(CI, long).lora_rl.algorithm.overlong_buffer == 4
    assert load_run_config(CI, (*long, "lora_rl.algorithm.overlong_buffer=0")).lora_rl.algorithm.overlong_buffer == 0
    assert AlgorithmSettings().overlong_buffer == 0


REFUSED = {
    "k1 in the loss": (("kl_coefficient=0.1", "kl_estimator=k1"), "use k2 or k3"),
    "k3 in the reward": (("kl_coefficient=0.1", "kl_in=reward", "kl_estimator=k3"), "use k1"),
    "target without a start": (("kl_target=0.1",), "give it a value above 0"),
    "flowrl with kl": (("name=flowrl", "kl_coefficient=0.1"), "the reference is part of the objective of flowrl"),
    "flowrl by token": (("name=flowrl", "aggregation=token_mean"), "aggregation must be sequence_mean"),
    "flowrl corrected by token": (("name=flowrl", "correction=icepop"), "correction must be sequence or none"),
    "gspo corrected by token": (("name=gspo", "correction=token"), "correction must be sequence or none"),
    "gspo by token": (("name=gspo", "aggregation=token_mean"), "gspo weighs whole completions"),
    "dynamic sampling of ppo": (("name=ppo", "dynamic_sampling=true"), "ppo learns from groups whose rewards are all"),
    "dynamic sampling of flowrl": (("name=flowrl", "dynamic_sampling=true"), "dynamic_sampling must be off"),
    "off-policy reinforce": (("name=reinforce", "minibatches=2"), "minibatches must be 1"),
    "another's setting": (("gae_lambda=0.9",), "gae_lambda has no effect with grpo"),
    "a clip without a ratio": (("name=reinforce", "clip_low=0.1"), "clip_low has no effect with reinforce"),
    "dual clip of gspo": (("name=gspo", "dual_clip=3"), "dual_clip has no effect with gspo"),
    "a constant that is not used": (("length_norm=4",), "length_norm has no effect with aggregation = token_mean"),
    "icepop upside down": (("icepop_low=6.0",), "icepop_low must be below icepop_high"),
    "buffer beyond the limit": (("overlong_buffer=5",), "exceeds task.max_new_tokens = 4"),
    "unknown": (("name=trpo",), "lora_rl.algorithm.name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_incompatible_choices_are_refused_with_the_reason(case: str):
    settings, reason = REFUSED[case]
    with pytest.raises(UserError) as refusal:
        run_config(*settings)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_settings_of_another_algorithm_at_their_defaults_are_no_mistake():
    full = AlgorithmSettings(name="gspo").model_dump()
    assert parse_config(AlgorithmSettings, full, "again") == AlgorithmSettings(name="gspo")
