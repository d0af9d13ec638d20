"""The vLLM engine against the built-in one, on a real vLLM; deaths, adapters by name, and what it refuses.

Run time on two idle cores: a minute and a half, nearly all of it six starts of vLLM.
"""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

from tests.vllm_here import needs_vllm
from tuneloop.errors import EXIT_TRY_AGAIN, UserError
from tuneloop.models.adapter_io import Adapter
from tuneloop.models.forward import score
from tuneloop.models.load import load_model, load_tokenizer
from tuneloop.models.lora import attach, attach_adapter, extract, peft_config
from tuneloop.models.packed import pack
from tuneloop.models.sources import resolve_model
from tuneloop.rollout.build import build_engine
from tuneloop.rollout.engine import Completion, SampleStream
from tuneloop.rollout.settings import EngineSettings
from tuneloop.rollout.torch_engine import TorchEngine
from tuneloop.rollout.vllm_engine import VllmEngine, VllmOptions
from tuneloop.rollout.vllm_process import EngineDied
from tuneloop.rollout.weight_sync import Canary, CanaryFailed, WeightSync
from tuneloop.settings import LoraSettings, SamplingSettings

pytestmark = needs_vllm

BASE = "tiny://qwen2?seed=0&heads=2&kv_heads=1"  # heads of 32: vLLM's CPU kernels know none of 16
PROMPTS = [[40, 41, 42, 43, 44], [50], [60, 61, 62], [70, 71, 72, 73, 74, 75, 76], list(range(100, 180))]
PAIRS = [(prompt, [80, 81, 2, 90, 33, 47, 200]) for prompt in PROMPTS]
GREEDY, SAMPLED, WARM = SamplingSettings(temperature=0.0), SamplingSettings(), SamplingSettings(temperature=0.7)
# Nats on a token; float32 gives 4e-6, a wrong or a stale adapter more than 1.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def base() -> Path:
    return resolve_model(BASE)


def adapter_of(base: Path, rank: int, seed: int, **settings) -> Adapter:
    """An adapter that changes every log-prob."""
    chosen = LoraSettings(rank=rank, alpha=2.0 * rank, **settings)
    model = load_model(base, "float32", "cpu")
    layers = attach(model, chosen, seed=seed)
    for index, layer in enumerate(layers.values()):
        layer.B.data.normal_(std=0.2, generator=torch.Generator().manual_seed(100 * seed + index))
    return extract(layers, peft_config(chosen, layers, model, "test"))


def build(base: Path, log: Path, sampling: SamplingSettings = SAMPLED, **settings) -> VllmEngine:
    model = load_model(base, "float32", "cpu")
    engine = build_engine(
        EngineSettings(kind="vllm", max_sequences=64, kv_cache_bytes=50_000_000, **settings),
        model,
        load_tokenizer(base),
        base_folder=base,
        dtype="float32",
        max_length=160,
        max_rank=5,
        max_adapters=2,
        sampling=sampling,
        log=log,
    )
    assert isinstance(engine, VllmEngine)
    return engine


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("vllm") / "engine.log"


@pytest.fixture(scope="module")
def engine(base: Path, log: Path) -> Iterator[VllmEngine]:
    engine = build(base, log)
    yield engine
    folder = engine._folder.path
    engine.close()
    assert not folder.exists()


@pytest.fixture
def reference(base: Path) -> TorchEngine:
    return TorchEngine(base, dtype="float32", device="cpu")


def generate(engine, prompts=PROMPTS, *, samples=1, sampling=GREEDY, new=12, stream=None, name="policy"):
    stream = stream or SampleStream(seed=11, round=2)
    return engine.generate(
        prompts, samples=samples, sampling=sampling, max_new_tokens=new, stream=stream, adapter=name
    )  # fmt: skip


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def flat(parts: Iterable[list[float]]) -> list[float]:
    return [value for part in parts for value in part]


def gap(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_trainer_and_both_engines_agree_with_an_adapter(base: Path, engine: VllmEngine, reference: TorchEngine):
    adapter = adapter_of(base, 4, seed=1)
    assert engine.sync(adapter) == reference.sync(adapter) == adapter.digest()
    model = load_model(base, "float32", "cpu")
    attach_adapter(model, adapter)
    with torch.no_grad():
        trainer = score(model, pack([(prompt, [completion]) for prompt, completion in PAIRS], "cpu")).logprobs_S
    by_vllm = engine.logprobs(PAIRS)
    assert gap([trainer.tolist()], [flat(by_vllm)]) < TOLERANCE
    assert gap(reference.logprobs(PAIRS), by_vllm) < TOLERANCE
    assert tokens(generate(engine)) == tokens(generate(reference))
    engine.sync(None)
    assert gap(TorchEngine(base, dtype="float32", device="cpu").logprobs(PAIRS), engine.logprobs(PAIRS)) < TOLERANCE
    assert gap(by_vllm, engine.logprobs(PAIRS)) > 0.1


def test_ranks_and_alphas_by_module(base: Path, engine: VllmEngine, reference: TorchEngine):
    """As ranks that change in training leave them."""
    adapter = adapter_of(base, 4, seed=3, rank_pattern={"q_proj": 2, "down_proj": 5}, alpha_pattern={"v_proj": 20.0})
    assert len({a.shape[0] for a, _ in adapter.factors.values()}) == 3
    engine.sync(adapter)
    reference.sync(adapter)
    assert gap(reference.logprobs(PAIRS), engine.logprobs(PAIRS)) < TOLERANCE


def test_reported_logprobs_are_of_the_sampling_distribution_before_top_k(base: Path, engine: VllmEngine):
    adapter = adapter_of(base, 4, seed=1)
    engine.sync(adapter)
    for sampling in (SAMPLED, SamplingSettings(top_k=2), GREEDY):
        for prompt, group in zip(PROMPTS, generate(engine, samples=3, sampling=sampling), strict=True):
            scored = engine.logprobs([(prompt, completion.token_ids) for completion in group])
            assert gap([completion.logprobs for completion in group], scored) < TOLERANCE
    [group] = generate(engine, PROMPTS[:1], samples=40, sampling=SamplingSettings(top_k=2), new=1)
    assert len({completion.token_ids[0] for completion in group}) == 2  # top_k did cut


def test_samples_depend_on_their_stream_alone(engine: VllmEngine):
    engine.sync(None)
    stream = SampleStream(seed=5, round=9, prompt_indices=[3, 1, 7, 2, 4])
    together = tokens(generate(engine, samples=4, sampling=SAMPLED, stream=stream))
    assert together == tokens(generate(engine, samples=4, sampling=SAMPLED, stream=stream))
    for place, name in enumerate(stream.prompt_indices or []):
        alone = SampleStream(seed=5, round=9, prompt_indices=[name])
        assert tokens(generate(engine, [PROMPTS[place]], samples=4, sampling=SAMPLED, stream=alone)) == [
            together[place]
        ]
    made = [tuple(completion) for group in together for completion in group]
    assert len(set(made)) == len(made)
    for other in (SampleStream(6, 9, [3]), SampleStream(5, 8, [3]), SampleStream(5, 9, [8])):
        assert tokens(generate(engine, PROMPTS[:1], samples=4, sampling=SAMPLED, stream=other))[0] != together[0]


def test_prompts_of_more_tokens_than_a_step_takes(engine: VllmEngine):
    """vLLM would prefill one of them in two steps, and cannot set its generator back on a CPU."""
    engine.sync(None)
    prompts = [list(range(10 + n, 160)) for n in range(60)]
    assert sum(map(len, prompts)) > 4096
    made = tokens(generate(engine, prompts, samples=2, sampling=SAMPLED, new=3))
    alone = SampleStream(seed=11, round=2, prompt_indices=[59])
    assert tokens(generate(engine, prompts[59:], samples=2, sampling=SAMPLED, new=3, stream=alone)) == made[59:]


def test_samples_follow_the_distribution(engine: VllmEngine, reference: TorchEngine):
    """First tokens of 2,000 samples against the probabilities that the engine reports."""
    engine.sync(None)
    [group] = generate(engine, PROMPTS[:1], samples=2000, sampling=SAMPLED, new=1)
    drawn = torch.tensor([completion.token_ids[0] for completion in group]).bincount(minlength=259)
    [row] = zip(*engine.logprobs([(PROMPTS[0], [token]) for token in range(259)]), strict=True)
    expected = 2000 * torch.tensor(row).exp()
    common = expected >= 5
    chi2 = float(((drawn - expected)[common] ** 2 / expected[common]).sum())
    freedom = int(common.sum()) - 1
    # The mean of chi-square is its degrees of freedom, its variance twice that.
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5
    assert int(common.sum()) > 50


def test_a_completion_ends_at_the_end_token_and_says_so(base: Path, engine: VllmEngine, reference: TorchEngine):
    engine.sync(None)
    made = [c for group in generate(engine, samples=16, sampling=SAMPLED, new=64) for c in group]
    ends = reference.end_ids
    finished, cut = [c for c in made if c.finished], [c for c in made if not c.finished]
    assert finished
    assert cut
    assert all(c.token_ids[-1] in ends and not set(c.token_ids[:-1]) & ends for c in finished)
    assert all(len(c.token_ids) == 64 and not set(c.token_ids) & ends for c in cut)
    assert all(len(c.logprobs) == len(c.token_ids) for c in made)


def test_adapters_by_name_do_not_mix(base: Path, engine: VllmEngine, reference: TorchEngine):
    one, other = adapter_of(base, 4, seed=1), adapter_of(base, 5, seed=2)
    engine.sync(None)
    engine.sync(one, "first task")
    engine.sync(other, "second/task")
    for name, adapter in (("first task", one), ("second/task", other), ("nobody", None)):
        reference.sync(adapter)
        assert gap(reference.logprobs(PAIRS), engine.logprobs(PAIRS, name)) < TOLERANCE
        assert tokens(generate(engine, name=name)) == tokens(generate(reference))
    with pytest.raises(UserError, match="'third' is one more than the 2"):
        engine.sync(one, "third")
    with pytest.raises(UserError, match="rank 9"):
        engine.sync(adapter_of(base, 9, seed=2), "first task")
    assert engine.sync(None, "nobody") == ""
    reference.sync(one)
    assert gap(reference.logprobs(PAIRS), engine.logprobs(PAIRS, "first task")) < TOLERANCE  # still there
    engine.sync(None, "first task")
    engine.sync(None, "second/task")


def test_what_the_adapter_before_left_in_the_cache_is_not_used(base: Path, engine: VllmEngine, reference: TorchEngine):
    """The last prompt fills whole blocks of the KV cache; equal prompts share them, but not over a sync."""
    for seed in (1, 2, 1):
        adapter = adapter_of(base, 4, seed=seed)
        engine.sync(adapter)
        reference.sync(adapter)
        [group] = generate(engine, PROMPTS[-1:], samples=2, sampling=SAMPLED)
        scored = reference.logprobs([(PROMPTS[-1], completion.token_ids) for completion in group])
        assert gap([completion.logprobs for completion in group], scored) < TOLERANCE
    assert len(list(engine._folder.path.iterdir())) == 2  # the lock and the newest adapter


def test_the_canary_finds_an_adapter_that_did_not_arrive(base: Path, engine: VllmEngine):
    model = load_model(base, "float32", "cpu")
    adapter = adapter_of(base, 4, seed=1)
    layers = attach_adapter(model, adapter)
    sync = WeightSync(engine, model, layers, adapter.config, [Canary(*pair) for pair in PAIRS], 1e-3)
    assert sync() < TOLERANCE
    hand_over = engine._hand_over
    engine._hand_over = lambda process, name, path: adapter.digest()  # type: ignore[method-assign]
    try:
        for layer in layers.values():
            layer.B.data.mul_(0.5)
        with pytest.raises(CanaryFailed, match=r"after .* was sent"):
            sync()
        current = extract(layers, adapter.config).digest()
        engine._hand_over = lambda process, name, path: current  # type: ignore[method-assign]
        with pytest.raises(CanaryFailed, match="nats a token"):
            sync()
    finally:
        engine._hand_over = hand_over  # type: ignore[method-assign]


def test_killed_while_it_samples_it_gives_the_same_samples(base: Path, engine: VllmEngine, capfd, log: Path):
    adapter, other = adapter_of(base, 4, seed=1), adapter_of(base, 5, seed=2)
    engine.sync(adapter)
    engine.sync(other, "other")

    def sample() -> tuple[list[list[Completion]], float]:
        started = time.monotonic()
        return generate(engine, PROMPTS * 8, samples=8, sampling=SAMPLED, new=70), time.monotonic() - started

    expected, seconds = sample()
    before, scored = engine.pid, engine.logprobs(PAIRS, "other")
    assert before
    killer = threading.Timer(seconds / 2, os.kill, (before, signal.SIGKILL))
    killer.start()
    again, _ = sample()
    killer.join()
    assert again == expected
    assert engine.pid != before
    assert engine.logprobs(PAIRS, "other") == scored
    said = capfd.readouterr().out
    assert "was killed by SIGKILL in 'generate'" in said
    assert "starting it again, 1 of 3" in said
    assert "INFO" not in said  # vLLM's own output is in its log
    assert "Initializing a V1 LLM engine" in log.read_text()


def test_an_engine_that_keeps_dying_ends_the_run_as_try_again(base: Path, engine: VllmEngine):
    engine.max_restarts = 0
    os.kill(engine.pid or 0, signal.SIGKILL)
    with pytest.raises(EngineDied, match="SIGKILL") as died:
        engine.logprobs(PAIRS)
    assert died.value.exit_code == EXIT_TRY_AGAIN
    engine.sleep()  # a dead engine sleeps
    engine.max_restarts = 3


def test_requests_that_do_not_fit_are_refused(engine: VllmEngine):
    with pytest.raises(UserError, match="may have 161 tokens"):
        generate(engine, PROMPTS[-1:], new=81)
    with pytest.raises(UserError, match=r"temperature 0\.7"):
        generate(engine, sampling=WARM)
    with pytest.raises(UserError, match="before top_k and top_p"):
        generate(engine, sampling=SamplingSettings(temperature=0.7, top_k=3))


def test_merged_sync_and_other_temperatures(base: Path, tmp_path: Path, reference: TorchEngine):
    engine = build(base, tmp_path / "engine.log", WARM, sync="merged", use_shm=False)
    try:
        one, other = adapter_of(base, 9, seed=1), adapter_of(base, 4, seed=2)  # no rank is too large to merge
        for adapter in (one, other, None, one):
            assert engine.sync(adapter) == reference.sync(adapter)
            assert gap(reference.logprobs(PAIRS), engine.logprobs(PAIRS)) < TOLERANCE
        engine.sync(other, "other")
        reference.sync(other, "other")
        for name in ("policy", "other", "policy"):
            assert gap(reference.logprobs(PAIRS, name), engine.logprobs(PAIRS, name)) < TOLERANCE
        model = load_model(base, "float32", "cpu")
        attach_adapter(model, one)
        for prompt, group in zip(PROMPTS, generate(engine, samples=3, sampling=WARM), strict=True):
            batch = pack([(prompt, [completion.token_ids for completion in group])], "cpu")
            with torch.no_grad():
                at_temperature = score(model, batch, 0.7).logprobs_S.tolist()
            assert gap([flat(completion.logprobs for completion in group)], [at_temperature]) < TOLERANCE
        with pytest.raises(UserError, match="processed_logprobs"):
            generate(engine, sampling=SamplingSettings(top_p=0.9))
    finally:
        engine.close()


def test_what_vllm_refuses_to_start_with_is_one_line(tmp_path: Path):
    options = VllmOptions(str(tmp_path), "float32", 64, 8, 1, ("q_proj",), 8, (2,), kv_cache_bytes=10_000_000)
    with pytest.raises(UserError, match="vLLM does not start like this: ") as refused:
        VllmEngine(options, tmp_path / "engine.log")
    assert "\n" not in str(refused.value)
