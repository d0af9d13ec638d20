"""The built-in rollout engine against transformers' generate, and its promises about sampling."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tuneloop.errors import UserError
from tuneloop.models.adapter_io import Adapter
from tuneloop.models.load import load_model, load_tokenizer
from tuneloop.models.lora import attach, extract, peft_config
from tuneloop.models.sources import resolve_model
from tuneloop.rollout.engine import SampleStream
from tuneloop.rollout.torch_engine import TorchEngine
from tuneloop.rollout.weight_sync import Canary, CanaryFailed, WeightSync
from tuneloop.settings import LoraSettings, SamplingSettings

PROMPTS = [[40, 41, 42, 43, 44], [50], [60, 61, 62], [70, 71, 72, 73, 74, 75, 76]]
GREEDY = SamplingSettings(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve_model("tiny://qwen2?seed=3", tmp_path_factory.mktemp("models"))


@pytest.fixture
def engine(folder: Path) -> TorchEngine:
    return TorchEngine(folder, dtype="float32")


def generate(engine: TorchEngine, prompts, *, samples=1, sampling=GREEDY, new=12, stream=None):
    stream = stream or SampleStream(seed=11, round=2)
    return engine.generate(prompts, samples=samples, sampling=sampling, max_new_tokens=new, stream=stream)


def test_greedy_equals_transformers_generate(folder: Path, engine: TorchEngine):
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, [completion] in zip(PROMPTS, generate(engine, PROMPTS), strict=True):
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


def test_reported_logprobs_are_those_of_the_tokens(engine: TorchEngine):
    sampled = generate(engine, PROMPTS, samples=3, sampling=SamplingSettings())
    for prompt, completions in zip(PROMPTS, sampled, strict=True):
        for completion in completions:
            [scored] = engine.logprobs([(prompt, completion.token_ids)])
            torch.testing.assert_close(torch.tensor(completion.logprobs), torch.tensor(scored), rtol=1e-4, atol=1e-4)


def test_sampling_does_not_depend_on_batching(folder: Path, engine: TorchEngine):
    stream = SampleStream(seed=5, round=9, prompt_indices=[3, 1, 7, 2])
    together = generate(engine, PROMPTS, samples=4, sampling=SamplingSettings(), stream=stream)
    few_at_once = TorchEngine(folder, dtype="float32", max_sequences=1)
    for place, name in enumerate([3, 1, 7, 2]):
        [alone] = generate(
            few_at_once,
            PROMPTS[place : place + 1],
            samples=4,
            sampling=SamplingSettings(),
            stream=SampleStream(seed=5, round=9, prompt_indices=[name]),
        )
        assert [c.token_ids for c in alone] == [c.token_ids for c in together[place]]


def test_prompts_that_wait_join_those_under_way_and_sample_the_same(folder: Path):
    """Fourteen prompts of different lengths through places for three: they end at different times and are replaced."""
    engine = TorchEngine(folder, dtype="float32")
    engine.end_ids |= frozenset(range(100, 140))  # so that completions end early, each at another length
    with torch.no_grad():
        for name, parameter in engine.model.named_parameters():
            if "proj" in name:
                parameter.mul_(8)  # so that what attention sees matters
    prompts = [[60 + place % 7] * (1 + place % 5) + [5, 9, place + 20] for place in range(14)]
    stream = SampleStream(seed=5, round=9)
    together = generate(engine, prompts, samples=2, sampling=SamplingSettings(), new=48, stream=stream)
    engine.max_sequences = 6
    queued = generate(engine, prompts, samples=2, sampling=SamplingSettings(), new=48, stream=stream)
    assert len({len(completion.token_ids) for group in together for completion in group}) > 5
    for one, other in zip(queued, together, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert mine.token_ids == theirs.token_ids
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


def test_seed_round_prompt_and_sample_all_matter(engine: TorchEngine):
    def tokens(stream: SampleStream) -> list[list[int]]:
        [group] = generate(engine, PROMPTS[:1], samples=2, sampling=SamplingSettings(), stream=stream)
        return [completion.token_ids for completion in group]

    base = tokens(SampleStream(1, 1, [1]))
    assert base == tokens(SampleStream(1, 1, [1]))
    assert base[0] != base[1]
    for other in (SampleStream(2, 1, [1]), SampleStream(1, 2, [1]), SampleStream(1, 1, [2])):
        assert tokens(other) != base


def test_generation_stops_at_the_end_token_and_says_so(folder: Path, engine: TorchEngine):
    sampled = generate(engine, PROMPTS, samples=16, sampling=SamplingSettings(), new=64)
    ends = engine.end_ids
    finished = [c for group in sampled for c in group if c.finished]
    cut = [c for group in sampled for c in group if not c.finished]
    assert finished, "no completion ended in 64 tokens of a vocabulary of 260: the end token is not recognised"
    assert all(c.token_ids[-1] in ends and not set(c.token_ids[:-1]) & ends for c in finished)
    assert all(len(c.token_ids) == 64 and not set(c.token_ids) & ends for c in cut)
    assert load_tokenizer(folder).convert_tokens_to_ids("<|im_end|>") in ends


def random_adapter(folder: Path, scale: float = 0.2) -> Adapter:
    model = load_model(folder, "float32")
    layers = attach(model, LoraSettings(rank=4, alpha=8.0), seed=1)
    for index, layer in enumerate(layers.values()):
        layer.B.data.normal_(std=scale, generator=torch.Generator().manual_seed(index))
    return extract(layers, peft_config(LoraSettings(rank=4, alpha=8.0), layers, model, "test"))


def test_sync_changes_what_is_sampled_and_none_restores_the_base(folder: Path, engine: TorchEngine):
    adapter = random_adapter(folder)
    [before] = engine.logprobs([(PROMPTS[0], PROMPTS[3])])
    assert engine.sync(adapter) == adapter.digest()
    [changed] = engine.logprobs([(PROMPTS[0], PROMPTS[3])])
    assert max(abs(a - b) for a, b in zip(before, changed, strict=True)) > 0.01
    engine.sync(None)
    assert engine.logprobs([(PROMPTS[0], PROMPTS[3])]) == [before]


def trainer_with(engine_model, folder: Path, tolerance: float = 1e-3):
    layers = attach(engine_model, LoraSettings(rank=4, alpha=8.0), seed=1)
    for layer in layers.values():
        layer.B.data.normal_(std=0.2, generator=torch.Generator().manual_seed(2))
    config = peft_config(LoraSettings(rank=4, alpha=8.0), layers, engine_model, "test")
    engine = TorchEngine.sharing(engine_model, load_tokenizer(folder))
    sync = WeightSync(engine, engine_model, layers, config, [Canary(PROMPTS[0], PROMPTS[2])], tolerance)
    return layers, engine, sync


def test_sharing_an_engine_leaves_the_trainers_weights_alone(folder: Path):
    model = load_model(folder, "float32")
    layers, engine, sync = trainer_with(model, folder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sync()
    generate(engine, PROMPTS, samples=2, sampling=SamplingSettings())
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(layer.enabled for layer in layers.values())


def test_the_canary_passes_when_engine_and_trainer_agree(folder: Path):
    _, _, sync = trainer_with(load_model(folder, "float32"), folder)
    assert sync() < 1e-3


def test_the_canary_notices_an_adapter_that_never_arrived(folder: Path, monkeypatch: pytest.MonkeyPatch):
    _, engine, sync = trainer_with(load_model(folder, "float32"), folder)
    monkeypatch.setattr(engine, "sync", lambda adapter, name: "")
    with pytest.raises(CanaryFailed, match="the engine holds adapter none"):
        sync()


def test_the_canary_notices_an_engine_that_only_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch):
    _, engine, sync = trainer_with(load_model(folder, "float32"), folder)
    monkeypatch.setattr(engine, "sync", lambda adapter, name: adapter.digest())
    with pytest.raises(CanaryFailed, match="differ by"):
        sync()


def test_the_canary_notices_matrices_that_stopped_moving(folder: Path, monkeypatch: pytest.MonkeyPatch):
    layers, _, sync = trainer_with(load_model(folder, "float32"), folder)
    sync()
    next(iter(layers.values())).B.data.add_(1e-4)
    monkeypatch.setattr("tuneloop.rollout.merged_weights.fold", lambda *arguments: None)
    with pytest.raises(CanaryFailed, match="differ by"):
        sync()


def test_the_canary_says_whether_the_adapter_changed(folder: Path):
    layers, _, sync = trainer_with(load_model(folder, "float32"), folder)
    sync()
    sync()
    assert not sync.changed
    next(iter(layers.values())).B.data.add_(0.01)
    sync()
    assert sync.changed


@pytest.mark.parametrize("family", ["granite", "phi", "cohere"])
def test_a_model_with_another_kind_of_head_is_refused(family: str, folder: Path, tmp_path: Path):
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    scaled = {"granite": {"logits_scaling": 8.0}, "phi": {}, "cohere": {"logit_scale": 0.0625}}[family]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **scaled))
    if family == "phi":
        model.lm_head.bias.data.normal_()
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not supported"):
        load_model(tmp_path, "float32")


def test_an_incomplete_model_is_refused(folder: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks the weights"):
        load_model(copy, "float32")
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(copy, "float32")


def test_an_adapter_for_another_base_is_refused(folder: Path, engine: TorchEngine, tmp_path: Path):
    other = resolve_model("tiny://qwen2?seed=3&hidden_size=32", tmp_path)
    with pytest.raises(Exception, match="made for another base"):
        engine.sync(random_adapter(other))


def saved_model(folder: Path, tokenizer_of: Path, kind: str, **sizes: object) -> Path:
    """A random model of transformers' own, with the tiny model's tokenizer."""
    for file in (*tokenizer_of.glob("*token*"), *tokenizer_of.glob("chat_template*")):
        shutil.copy(file, folder)
    common = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
              "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(common | sizes))).save_pretrained(folder)
    return folder


def test_a_model_whose_rotary_positions_are_partial_decodes(folder: Path, tmp_path: Path):
    """Its queries come in another order of memory."""
    engine = TorchEngine(saved_model(tmp_path, folder, "glm", head_dim=8), dtype="float32")
    sampled = generate(engine, PROMPTS, samples=2, sampling=SamplingSettings())
    for prompt, completions in zip(PROMPTS, sampled, strict=True):
        for completion in completions:
            [scored] = engine.logprobs([(prompt, completion.token_ids)])
            torch.testing.assert_close(torch.tensor(completion.logprobs), torch.tensor(scored), rtol=1e-4, atol=1e-4)


def test_a_model_that_cannot_be_told_how_to_attend_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="not supported"):
        load_model(saved_model(tmp_path, folder, "stablelm"), "float32")


def test_logits_that_are_not_numbers_end_the_rollout(engine: TorchEngine):
    engine.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not numbers"):
        generate(engine, PROMPTS, sampling=SamplingSettings())


def test_only_what_was_sent_is_sampled_from(engine: TorchEngine):
    with pytest.raises(KeyError, match="never sent"):
        engine.generate(
            PROMPTS, samples=1, sampling=GREEDY, max_new_tokens=2, stream=SampleStream(1, 1), adapter="never sent"
        )
    assert engine.logprobs([]) == []
