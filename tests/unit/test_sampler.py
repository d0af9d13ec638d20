"""Drawing tokens: the right distribution, the right log-probs."""

import pytest
import torch

from tuneloop.rollout.sampler import draw
from tuneloop.settings import SamplingSettings


def draws(logits: torch.Tensor, uniform: torch.Tensor, **settings: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.zeros(uniform.numel(), dtype=torch.long)
    return draw(logits, rows, uniform, SamplingSettings(**settings))


def grid(count: int) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("vocabulary", [3, 256, 1000])
def test_inversion_gives_every_token_its_probability(vocabulary: int):
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    count = 200_000
    tokens, _ = draws(logits, grid(count))
    shares = torch.bincount(tokens, minlength=vocabulary) / count
    torch.testing.assert_close(shares, logits.softmax(-1)[0], rtol=0.0, atol=2.0 / count + 1e-6)


def test_logprobs_are_those_of_the_temperature():
    logits = torch.tensor([[2.0, 0.0, -1.0]])
    tokens, logprobs = draws(logits, grid(50), temperature=0.5)
    torch.testing.assert_close(logprobs, (logits / 0.5).log_softmax(-1)[0, tokens])


def test_greedy_takes_the_largest_and_reports_its_logprob_at_temperature_one():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    tokens, logprobs = draws(logits, torch.tensor([0.99], dtype=torch.float64), temperature=0.0)
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[0, 1:2])


def test_top_k_and_top_p_leave_out_the_tail():
    # probabilities 0.5, 0.3, 0.15, 0.05
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert set(draws(logits, grid(1000), top_k=2)[0].tolist()) == {0, 1}
    assert set(draws(logits, grid(1000), top_p=0.75)[0].tolist()) == {0, 1}
    assert set(draws(logits, grid(1000), top_p=0.81)[0].tolist()) == {0, 1, 2}


def test_a_token_without_probability_is_never_drawn():
    logits = torch.full((1, 300), float("-inf"))
    logits[0, 7] = logits[0, 290] = 0.0
    tokens, _ = draws(logits, torch.tensor([0.0, 0.49999, 0.5, 1.0 - 2**-53], dtype=torch.float64))
    assert tokens.tolist() == [7, 7, 290, 290]


def test_every_draw_uses_its_own_row():
    logits = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    tokens, _ = draw(logits, torch.tensor([0, 0, 1]), torch.full((3,), 0.5, dtype=torch.float64), SamplingSettings())
    assert tokens.tolist() == [0, 0, 1]
