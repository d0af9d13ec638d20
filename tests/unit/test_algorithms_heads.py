"""Heads read the right hidden states, the pre-pass scores the whole rollout, and neither moves the adapter.

Legend: S scored tokens, T packed tokens, D hidden size.
"""

import pytest
import torch
from torch import nn

from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.models.forward import score, score_with_hidden
from tuneloop.models.load import load_model
from tuneloop.models.lora import attach, extract, trainable_parameters
from tuneloop.models.packed import pack
from tuneloop.models.sources import resolve_model
from tuneloop.settings import LoraSettings, OptimizerSettings
from tuneloop.training.heads import HEADS, make_heads, score_with_heads
from tuneloop.training.optim import MasterAdamW
from tuneloop.training.prepass import prepass
from tuneloop.training.reference import ReferencePolicy
from tuneloop.training.settings import RlSettings
from tuneloop.world import World

GROUPS = [([5, 6, 7], [[8, 9], [10]]), ([11], [[12, 13, 14]]), ([15, 16], [[17], [18, 19]])]


@pytest.fixture(scope="module")
def model():
    model = load_model(resolve_model("tiny://qwen2?seed=0"), "float32", "cpu")
    layers = attach(model, LoraSettings(rank=4, alpha=8.0), 5)
    generator = torch.Generator().manual_seed(5)
    for layer in layers.values():
        layer.B.data.normal_(std=0.1, generator=generator)
    return model, layers


def shaken(heads: nn.ModuleDict) -> nn.ModuleDict:
    """Away from the zeros that the last layers start with."""
    generator = torch.Generator().manual_seed(9)
    for parameter in heads.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return heads


def test_estimates_are_those_of_each_sequence_alone(model):
    heads = shaken(make_heads(list(HEADS), model[0], seed=1))
    with torch.no_grad():
        _, together = score_with_heads(model[0], heads, pack(GROUPS), 1.0)
        values, log_z = [], []
        for prompt, completions in GROUPS:
            for completion in completions:
                _, hidden_TD = score_with_hidden(model[0], pack([(prompt, [completion])]))
                rows = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
                values.append(heads["values_S"].net(hidden_TD)[rows, 0])
                log_z.append(heads["log_z_B"].net(hidden_TD[: len(prompt)].mean(0))[0])
    torch.testing.assert_close(together["values_S"], torch.cat(values), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together["log_z_B"], torch.stack(log_z), rtol=1e-4, atol=1e-5)


def test_heads_start_at_zero_from_their_seed(model):
    first, again, other = (make_heads(list(HEADS), model[0], seed=seed) for seed in (1, 1, 2))
    _, estimates = score_with_heads(model[0], first, pack(GROUPS), 1.0)
    assert not any(estimate.any() for estimate in estimates.values())
    weights = [[p.detach() for p in heads.parameters()] for heads in (first, again, other)]
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not all(map(torch.equal, weights[0], weights[2]))


def test_partition_head_is_the_papers_perceptron(model):
    [head] = make_heads(["log_z_B"], model[0], seed=1).values()
    kinds = [type(layer).__name__ for layer in head.modules() if not list(layer.children())]
    assert kinds == ["Linear", "GELU", "LayerNorm", "Linear", "GELU", "LayerNorm", "Linear"]


def test_heads_do_not_move_the_adapter(model):
    heads = shaken(make_heads(list(HEADS), model[0], seed=1))
    MasterAdamW(trainable_parameters(model[1]), OptimizerSettings(learning_rate=0.1), 1).release()
    _, estimates = score_with_heads(model[0], heads, pack(GROUPS), 1.0)
    torch.cat(list(estimates.values())).square().sum().backward()
    assert all(parameter.grad is None for _, parameter in trainable_parameters(model[1]))
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in heads.parameters())


@pytest.mark.parametrize("budget", [8, 8192])
def test_prepass_holds_every_token_in_the_rollouts_order(model, budget: int):
    network, layers = model
    reference = ReferencePolicy(network, layers, extract(layers, {"lora_alpha": 8.0}))
    heads = shaken(make_heads(["values_S"], network, seed=1))
    algorithm = AlgorithmSettings(name="ppo", kl_coefficient=0.1)
    settings = RlSettings(micro_batch_tokens=budget, algorithm=algorithm)
    before = prepass(network, reference, GROUPS, settings, World(), heads)
    with torch.no_grad():
        batch = pack(GROUPS)
        old_S = score(network, batch).logprobs_S
        _, estimates = score_with_heads(network, heads, batch, 1.0)
    torch.testing.assert_close(before.old_W, old_S, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(before.values_W, estimates["values_S"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(before.reference_W, old_S, rtol=1e-4, atol=1e-5)  # the reference is the policy as it is
