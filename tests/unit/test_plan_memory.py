"""Planned bytes against arithmetic by hand, against what autograd saves, and against what a cache really holds."""

from dataclasses import replace

import pytest

from components.check.plan_inputs import plan_inputs
from components.config import load_run_config
from tests.tiny_run import tiny_config
from tuneloop.plan.activations import layer_bytes, training_pass
from tuneloop.plan.devices import Device, find_gpu
from tuneloop.plan.inputs import adapter_size, packed_work, rl_work, sft_work
from tuneloop.plan.lora_rl import plan_lora_rl
from tuneloop.plan.memory import plan_evaluate, plan_sft
from tuneloop.plan.rollout import VLLM_CPU_BYTES, VLLM_WORKING_BYTES, torch_rollout, vllm_rollout

CPU = Device("cpu", 10**12, 1e12, 1e11, 1e11, 1e11)
H100 = find_gpu("h100-80gb")


def large(*overrides: str):
    return plan_inputs(load_run_config("configs/qwen2.5-72b-8x80gb.toml", overrides))


def test_passes_are_filled_as_the_trainer_fills_them():
    from tuneloop.training.batching import micro_batches

    work = packed_work(prompt=30, completion=9, samples=4, groups=13, budget=200)
    groups = [(range(30), [range(9)] * 4)] * 13
    passes = micro_batches(groups, 200)
    assert work.group_tokens == 30 + 4 * 8
    assert (work.groups, work.passes) == (len(passes[0]), len(passes)) == (3, 5)
    assert packed_work(30, 9, 4, 13, budget=10).groups == 1  # a group alone exceeds the budget


def test_adapter_by_hand():
    # 2 layers of 64: q 64x64, k and v 32x64, o 64x64, gate and up 128x64, down 64x128.
    size = adapter_size(plan_inputs(tiny_config()))
    assert size.parameters == 8192  # rank 4; see test_check
    assert size.matrices == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert size.ranks == 7 * 4


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.dtype='bfloat16'", "lora.rank=7"),
        ("lora.target_modules='attention'",),
        (
            "lora.target_modules='mlp'",
            "model.uri='tiny://qwen2?layers=40'",
        ),  # the first layer's attention needs no gradient
        ("lora.target_modules=['down_proj', 'q_proj']",),
        ("model.uri='tiny://qwen2?seed=0&layers=3&kv_heads=4&intermediate_size=200'",),
    ],
)
def test_saved_bytes_are_what_autograd_saves(overrides):
    assert_saved(tiny_config(*overrides), full=False, within=0.02)


def test_saved_bytes_of_full_training():
    assert_saved(tiny_config("model.dtype='bfloat16'"), full=True, within=0.03)


def assert_saved(config, full: bool, within: float) -> None:
    import torch

    from tuneloop.models.forward import score
    from tuneloop.models.load import load_model
    from tuneloop.models.lora import attach
    from tuneloop.models.packed import pack
    from tuneloop.models.sources import resolve_model

    model = load_model(resolve_model(config.model.uri), config.model.dtype, "cpu")
    if full:
        model.requires_grad_(True)
    else:
        attach(model, config.lora, seed=0)
    groups = [(list(range(3, 73)), [list(range(5, 30))] * 4)] * 3
    batch = pack(groups)
    known = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    saved: dict[int, int] = {}
    held = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)  # or another one could get its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        score(model, batch)
    tokens, inputs = batch.input_ids_T.numel(), plan_inputs(config)
    work = packed_work(70, 25, 4, groups=3, budget=10_000)
    assert work.tokens == tokens
    found = training_pass(inputs, work, full=full, checkpointing=False, on_cpu=True)
    # Beside the layers: the final norm (with LoRA in place of the first one, whose input needs no gradient), cosines
    # and sines of the positions, and one of the head's two sets of rows.
    beside = tokens * 2 * 16 * inputs.width + (tokens * 64 * (4 + 2 * inputs.width) if full else 0)
    assert sum(saved.values()) == pytest.approx(found.saved + found.head / 2 + beside, rel=within)


def test_checkpointing_keeps_one_layer_whole():
    inputs = plan_inputs(tiny_config("model.uri='tiny://qwen2?layers=10'"))
    work = rl_work(inputs, 1)
    plain, kept = (training_pass(inputs, work, full=False, checkpointing=on, on_cpu=True).saved for on in (False, True))
    a_layer, stream = layer_bytes(inputs, False) * work.tokens, 64 * 4 * work.tokens
    assert (plain, kept) == (10 * a_layer, 10 * stream + a_layer)


def test_cache_is_what_a_rollout_holds():
    import torch

    from tuneloop.models.forward import hidden_states
    from tuneloop.models.load import load_model
    from tuneloop.models.packed import pack
    from tuneloop.models.sources import resolve_model
    from tuneloop.rollout.kv_cache import GroupCache, Prefill

    config = tiny_config()
    model = load_model(resolve_model(config.model.uri), "float32", "cpu")
    cache = GroupCache(3)
    batch = pack([(list(range(3, 3 + config.data_prep.max_prompt_tokens)), [])] * 5)
    with torch.no_grad():
        hidden_states(model, batch.input_ids_T, batch.position_ids_T, Prefill(cache, batch))
    cache.reserve(config.task.max_new_tokens - 1)
    stores = (cache.prompt_keys, cache.prompt_values, cache.own_keys, cache.own_values)
    held = sum(tensor.untyped_storage().nbytes() for store in stores for tensor in store)
    assert torch_rollout(plan_inputs(config), prompts=5, samples=3, max_sequences=512).cache == held


def test_optimiser_and_weights_by_hand_on_one_gpu():
    inputs = plan_inputs(tiny_config())
    update = next(phase for phase in plan_lora_rl(inputs, H100).phases if phase.name == "update")
    assert update.device["weights"] == 4 * inputs.shape.parameters
    assert update.device["adapter"] == update.device["reference"] == 4 * 8192
    assert update.device["masters and moments"] == 12 * 8192
    assert update.device["gradients"] == 4 * 8192
    assert update.device["engine's merged matrices"] == 4 * adapter_size(inputs).matrices


def test_zero_parts_by_hand():
    adapter = adapter_size(large()).parameters

    def items(*overrides: str) -> dict[str, int]:
        memory = plan_lora_rl(large(*overrides), H100, 8)
        assert memory.gpus == 8
        return next(phase for phase in memory.phases if phase.name == "update").device

    resident = items("lora_rl.distributed.offload_parameters=false", "lora_rl.distributed.offload_optimizer=false")
    assert resident["weights"] == 2 * 72_706_203_648 // 8
    assert resident["masters and moments"] == 12 * adapter // 8
    assert resident["gradients"] == 4 * adapter // 8
    stage1 = items("lora_rl.distributed={zero_stage=1}")
    assert stage1["weights"] == 2 * 72_706_203_648
    assert stage1["gradients"] == 4 * adapter
    offloaded = items()
    assert "weights" not in offloaded
    assert offloaded["masters and moments"] == 0


def test_offloaded_weights_and_sleeping_engine_are_host_memory():
    phases = {phase.name: phase.host for phase in plan_lora_rl(large(), H100, 8).phases}
    weights = 2 * 72_706_203_648
    assert phases["update"]["weights, offloaded"] == weights
    assert phases["update"]["vLLM's weights, asleep"] == weights
    assert phases["update"]["base model in /dev/shm"] == weights
    awake = {p.name: p.host for p in plan_lora_rl(large("lora_rl.engine.sleep=false"), H100, 8).phases}
    assert "vLLM's weights, asleep" not in awake["update"]


def test_asleep_engine_leaves_the_gpu_to_the_trainer():
    memory = {phase.name: phase.device for phase in plan_lora_rl(large(), H100, 8).phases}
    share = int(0.4 * H100.memory_bytes)
    assert memory["rollout"]["vLLM"] == share
    assert memory["update"]["vLLM"] < share / 10
    assert "activations" not in memory["rollout"]


def test_vllm_share_by_hand():
    found = vllm_rollout(inputs := large(), inputs.rl.engine, H100)
    # 80 layers x (key, value) x one of eight heads of 128 x 2 bytes x 1,536 tokens
    assert found.a_sequence == 80 * 2 * 128 * 2 * 1536
    assert found.weights == 2 * 72_706_203_648 // 8
    assert found.cache == found.share - found.weights - found.adapters - 3_000_000_000


def test_cpu_peak_stays_in_later_phases():
    memory = plan_lora_rl(plan_inputs(tiny_config()), CPU)
    totals = {phase.name: phase.host_bytes for phase in memory.phases}
    mapped_alone = max(totals.values()) - min(totals.values())
    assert mapped_alone == 0  # nothing here is large enough to go back to the system
    assert memory.device_peak.device_bytes == 0


def test_more_of_anything_needs_more():
    inputs = plan_inputs(load_run_config("configs/demo.toml"))

    def rl(**changes) -> int:
        return plan_lora_rl(inputs.with_rl(**changes), CPU).host_peak.host_bytes

    base = rl()
    assert rl(micro_batch_tokens=2 * inputs.rl.micro_batch_tokens, algorithm__minibatches=1) > base
    assert rl(gradient_checkpointing=True) < base
    full = inputs.sft.model_copy(update={"mode": "full"})
    assert plan_sft(replace(inputs, sft=full), CPU).host_peak.host_bytes > plan_sft(inputs, CPU).host_peak.host_bytes
    assert plan_evaluate(replace(inputs, evaluated=64), CPU).host_peak.host_bytes < (
        plan_evaluate(inputs, CPU).host_peak.host_bytes
    )
    assert sft_work(inputs).tokens <= inputs.sft.micro_batch_tokens


def test_a_cache_that_is_asked_for_is_vllms_share():
    inputs = large("lora_rl.engine.kv_cache_bytes=20000000000")
    rollout = vllm_rollout(inputs, inputs.rl.engine, H100)
    assert rollout.cache == 20_000_000_000
    assert rollout.share == rollout.weights + rollout.adapters + VLLM_WORKING_BYTES + rollout.cache


def test_vllm_makes_room_for_the_largest_rank_of_a_schedule():
    plain, growing = large(), large("lora_rl.rank_schedule={kind='spectrum', max_rank=512}")
    sizes = [vllm_rollout(inputs, inputs.rl.engine, H100).adapters for inputs in (plain, growing)]
    assert sizes[1] == 512 / 32 * sizes[0]


def test_vllm_on_a_cpu_is_a_process_with_weights_of_its_own():
    plain, other = (plan_inputs(tiny_config(*overrides)) for overrides in ((), ("lora_rl.engine.kind=vllm",)))
    here, beside = (plan_lora_rl(inputs, CPU).host_peak.host_bytes for inputs in (plain, other))
    assert beside > here + VLLM_CPU_BYTES
    evaluated = plan_inputs(tiny_config("evaluate.engine.kind=vllm"))
    assert plan_evaluate(evaluated, CPU).host_peak.host["vLLM's weights"] == 2 * evaluated.weight_bytes
