"""How many fixed tokens trainer and engine are compared on."""

from components.lora_rl.training import CANARY_TOKENS, FEWEST_CANARIES, MOST_CANARIES, enough_canaries
from tuneloop.rollout.weight_sync import Canary


def chosen(length: int, candidates: int = 100) -> int:
    return len(enough_canaries(Canary([1], [2] * length) for _ in range(candidates)))


def test_short_completions_take_more_canaries_than_long_ones():
    assert chosen(4) == CANARY_TOKENS / 4
    assert chosen(200) == FEWEST_CANARIES
    assert chosen(1) == MOST_CANARIES
    assert chosen(4, candidates=3) == 3
