"""Full fine-tuning as the reference arm: it learns, the engine samples the trained weights, nothing is held twice."""

import json
from pathlib import Path

import pytest
import torch

from tests.tiny_rl import BASE, rl_trainer, warmed_up
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.errors import UserError
from tuneloop.models.digest import weights_digest
from tuneloop.models.forward import score
from tuneloop.models.load import load_model
from tuneloop.models.packed import pack
from tuneloop.models.sources import resolve_model
from tuneloop.rollout.engine import SampleStream
from tuneloop.rollout.shared_weights import SharedWeights
from tuneloop.rollout.torch_engine import TorchEngine
from tuneloop.settings import LoraSettings, OptimizerSettings, SamplingSettings
from tuneloop.training.finish import save_full_model
from tuneloop.training.policy import FullPolicy, absorb

BATCH = pack([([5, 6, 7, 8], [[9, 10, 11], [12]])])


def full_policy(dtype: str = "float32") -> FullPolicy:
    return FullPolicy(load_model(resolve_model(BASE), dtype, "cpu"))


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_full_arm_lifts_reward_and_its_engine_samples_the_new_weights(tmp_path: Path):
    policy = full_policy()
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    trainer = rl_trainer(
        tmp_path / "run", policy=policy, updates=12, optimizer=OptimizerSettings(learning_rate=2e-3), validate_every=12
    )
    result = trainer.run()
    metrics = rows(tmp_path / "run")
    assert metrics[-1]["reward/mean"] > metrics[1]["reward/mean"] + 0.3
    assert all(row["canary/changed"] == (row["update/steps"] > 0) for row in metrics[1:])
    assert all(row["canary/gap"] < 1e-4 for row in metrics[1:])
    assert all(row["divergence/mean"] < 1e-4 for row in metrics[1:])  # also where no step was made
    assert all(not torch.equal(tensor, before[name]) for name, tensor in policy.model.named_parameters())
    assert result.adapter_digest == weights_digest(policy.model) != result.reference_digest

    save_full_model(policy.model, resolve_model(BASE), tmp_path / "model")
    sampling, stream = SamplingSettings(), SampleStream(1, 1)
    prompts, wanted = [[5, 6, 7], [8, 9]], {"samples": 3, "sampling": sampling, "max_new_tokens": 5, "stream": stream}
    fresh = TorchEngine(tmp_path / "model", dtype="float32", device="cpu").generate(prompts, **wanted)
    shared = trainer.engine.generate(prompts, **wanted)
    bare = TorchEngine(resolve_model(BASE), dtype="float32", device="cpu").generate(prompts, **wanted)
    tokens = [[[c.token_ids for c in group] for group in made] for made in (fresh, shared, bare)]
    assert tokens[0] == tokens[1] != tokens[2]


def test_nothing_is_held_twice(tmp_path: Path):
    """Weights, masters, gradients and two moments: no reference, no merged matrices, no spare state."""
    policy = full_policy("bfloat16")
    trainer = rl_trainer(tmp_path, policy=policy)
    trainer.start()
    trainer.advance()
    count = sum(parameter.numel() for parameter in policy.model.parameters())
    state = trainer.learner.optimizer.state()
    assert [state[name].numel() for name in ("master", "exp_avg", "exp_avg_sq")] == [count] * 3
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert not trainer.learner.reference.kept
    assert isinstance(trainer.engine, TorchEngine)
    assert len(trainer.engine._merged) == 0
    assert not trainer.state._copies
    assert "kl/reference" not in rows(tmp_path)[-1]


def test_kl_in_the_loss_keeps_the_weights_that_training_started_from(tmp_path: Path):
    policy = full_policy()
    with torch.no_grad():
        before_S = score(policy.model, BATCH).logprobs_S
    trainer = rl_trainer(tmp_path, policy=policy, algorithm=AlgorithmSettings(kl_coefficient=0.1))
    trainer.start()
    trainer.advance()
    trainer.advance()
    assert rows(tmp_path)[-1]["kl/reference"] != 0.0
    trained = weights_digest(policy.model)
    assert torch.equal(trainer.learner.reference.logprobs(BATCH, 1.0), before_S)
    assert weights_digest(policy.model) == trained
    with torch.no_grad():
        assert float((score(policy.model, BATCH).logprobs_S - before_S).abs().max()) > 1e-3


def test_killed_full_arm_ends_with_the_same_weights(tmp_path: Path):
    whole = rl_trainer(tmp_path / "whole", policy=full_policy()).run()
    killed = rl_trainer(tmp_path / "killed", policy=full_policy())
    killed.start()
    for _ in range(3):
        killed.advance()  # a checkpoint after 2
    resumed = rl_trainer(tmp_path / "killed", policy=full_policy())
    assert resumed.state.update == 2
    assert resumed.run().adapter_digest == whole.adapter_digest


def test_warmed_up_adapter_is_absorbed():
    policy = warmed_up(LoraSettings(rank=4, alpha=8.0, rank_pattern={"up_proj": 3}))
    model = load_model(resolve_model(BASE), "float32", "cpu")
    with torch.no_grad():
        bare_S = score(model, BATCH).logprobs_S
        absorb(model, policy.adapter())
        absorbed_S = score(model, BATCH).logprobs_S
        torch.testing.assert_close(absorbed_S, score(policy.model, BATCH).logprobs_S, rtol=1e-5, atol=1e-5)
    assert float((absorbed_S - bare_S).abs().max()) > 1e-3


def test_engine_with_weights_of_its_own_is_refused():
    model = full_policy().model
    engine = TorchEngine(resolve_model(BASE), dtype="float32", device="cpu")
    with pytest.raises(UserError, match=r"engine\.kind = \"torch\""):
        SharedWeights(engine, model, [], 1e-3)
