"""Every algorithm by the name that a config gives it."""

from tuneloop.algorithms.cispo import CISPO
from tuneloop.algorithms.dapo import DAPO
from tuneloop.algorithms.dr_grpo import DR_GRPO
from tuneloop.algorithms.flowrl import FLOWRL
from tuneloop.algorithms.grpo import GRPO
from tuneloop.algorithms.gspo import GSPO
from tuneloop.algorithms.ppo import PPO
from tuneloop.algorithms.reinforce import REINFORCE
from tuneloop.algorithms.reinforce_pp import REINFORCE_PP, REINFORCE_PP_BASELINE
from tuneloop.algorithms.rloo import RLOO
from tuneloop.algorithms.types import Algorithm

ALGORITHMS: dict[str, Algorithm] = {
    "grpo": GRPO,
    "dr_grpo": DR_GRPO,
    "rloo": RLOO,
    "reinforce": REINFORCE,
    "reinforce_pp": REINFORCE_PP,
    "reinforce_pp_baseline": REINFORCE_PP_BASELINE,
    "ppo": PPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "flowrl": FLOWRL,
}
