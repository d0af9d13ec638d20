"""What tells the algorithms apart before any tensor is made. This module does not import torch."""

from dataclasses import dataclass, field
from typing import Any, Literal

AlgorithmName = Literal[
    "grpo", "dr_grpo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline", "ppo", "dapo", "gspo", "cispo",
    "flowrl",
]  # fmt: skip

_CLIP = {"clip_low", "clip_high"}
_VALUE = {"gamma", "gae_lambda", "value_coefficient", "value_clip"}
_FLOW = {"flow_beta", "flow_weight", "flow_weight_cap"}
SPECIAL_SETTINGS = frozenset({*_CLIP, "dual_clip", *_VALUE, *_FLOW})  # that some algorithms do not read


@dataclass(frozen=True)
class Traits:
    """What an algorithm's settings are by default, and what they may be.

    Attributes:
        defaults: where they differ from those of GRPO.
        reads: which of `SPECIAL_SETTINGS` have an effect.
        has_ratio: whether it corrects for the policy having moved since the rollout.
        whole_completions: whether ratio and loss belong to completions, not to tokens.
        learns_without_spread: whether groups whose rewards are all equal teach it anything.
        holds_reference: whether the reference policy is part of the objective.
    """

    defaults: dict[str, Any] = field(default_factory=dict)
    reads: frozenset[str] = frozenset({*_CLIP, "dual_clip"})
    has_ratio: bool = True
    whole_completions: bool = False
    learns_without_spread: bool = False
    holds_reference: bool = False


_SUM = {"aggregation": "sequence_mean_sum_norm"}
_KL_IN_REWARD = {"kl_in": "reward", "kl_estimator": "k1"}

TRAITS: dict[str, Traits] = {
    "grpo": Traits(),
    "dr_grpo": Traits(_SUM),
    "rloo": Traits(_SUM),
    "reinforce": Traits({**_SUM, **_KL_IN_REWARD}, reads=frozenset(), has_ratio=False, learns_without_spread=True),
    "reinforce_pp": Traits(_KL_IN_REWARD, learns_without_spread=True),
    "reinforce_pp_baseline": Traits({"kl_estimator": "k2"}),
    "ppo": Traits(
        {"dual_clip": 3.0, **_KL_IN_REWARD},
        reads=frozenset({*_CLIP, "dual_clip", *_VALUE}),
        learns_without_spread=True,
    ),
    "dapo": Traits({"clip_high": 0.28, "dynamic_sampling": True}),
    "gspo": Traits(
        {"clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sequence_mean", "correction": "sequence"},
        reads=frozenset(_CLIP),
        whole_completions=True,
    ),
    "cispo": Traits({"clip_low": 1.0, "clip_high": 4.0}, reads=frozenset(_CLIP)),
    "flowrl": Traits(
        {"aggregation": "sequence_mean", "correction": "none"},
        reads=frozenset({*_CLIP, *_FLOW}),
        whole_completions=True,
        learns_without_spread=True,
        holds_reference=True,
    ),
}
