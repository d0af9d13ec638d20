"""Verdicts, what limits, and settings that fit: the shipped configs, and ones that cannot."""

import json
from dataclasses import replace

import pytest

from components.check.hardware import check_hardware, refusal
from components.check.plan_inputs import may_change, plan_inputs
from components.config import load_run_config
from pipelines.cli import main
from tests.tiny_run import tiny_config
from tuneloop.errors import UserError
from tuneloop.plan.devices import GPUS, Device, find_gpu, measure_cpu
from tuneloop.plan.fit import nearest_fit
from tuneloop.plan.plan import make_plan
from tuneloop.plan.render import render_plan
from tuneloop.plan.shapes import PUBLISHED


def shipped(name: str, *overrides: str):
    config = load_run_config(f"configs/{name}.toml", overrides)
    return config, plan_inputs(config)


@pytest.mark.parametrize("name", ["qwen2.5-0.5b-1gpu", "qwen2.5-7b-8gpu", "qwen2.5-72b-8x80gb"])
def test_shipped_configs_fit_what_they_are_for(name):
    config, inputs = shipped(name)
    plan = make_plan(inputs, find_gpu(config.check.gpu), config.check.gpus)
    assert plan.fits, [limit.reason for limit in plan.limits]
    assert not plan.is_tight


def test_half_a_billion_fits_every_gpu_of_24_gigabytes():
    for gpu in GPUS.values():
        assert make_plan(shipped("qwen2.5-0.5b-1gpu")[1], gpu).fits


def test_72b_carries_the_tutorial_setting():
    config, inputs = shipped("qwen2.5-72b-8x80gb")
    rl = config.lora_rl
    assert (rl.prompts_per_update, rl.group_size, config.lora.rank, config.lora.alpha) == (64, 5, 32, 32.0)
    assert (rl.engine.tensor_parallel_size, rl.engine.gpu_memory_utilization, rl.engine.max_sequences) == (8, 0.4, 64)
    assert rl.optimizer.learning_rate == 3e-5
    assert rl.distributed.offload_parameters
    assert rl.distributed.offload_optimizer
    assert config.model.max_length == 1536
    assert inputs.shape.parameters == 72_706_203_648


@pytest.mark.parametrize(
    ("name", "gpu", "gpus", "overrides"),
    [
        ("qwen2.5-7b-8gpu", "a100-40gb", 8, ()),
        ("qwen2.5-7b-8gpu", "l40s-48gb", 8, ("lora_rl.micro_batch_tokens=16384",)),
        ("qwen2.5-0.5b-1gpu", "l4-24gb", 1, ("lora_rl.micro_batch_tokens=65536", "lora_rl.group_size=32")),
        ("qwen2.5-72b-8x80gb", "h100-80gb", 8, ("lora_rl.engine.tensor_parallel_size=1",)),
        ("qwen2.5-72b-8x80gb", "h100-80gb", 8, ("lora_rl.distributed={zero_stage=2}",)),
    ],
)
def test_the_lines_that_are_named_make_it_fit(name, gpu, gpus, overrides, tmp_path):
    _, inputs = shipped(name, *overrides)
    device = find_gpu(gpu)
    before = make_plan(inputs, device, gpus)
    assert not before.fits
    fit = nearest_fit(inputs, device, gpus)
    assert fit is not None
    assert fit.plan.fits
    changed = load_run_config(f"configs/{name}.toml", (*overrides, *(f"{c.table}.{c.line}" for c in fit.changes)))
    after = make_plan(plan_inputs(changed), device, gpus)
    assert after.fits
    assert after.needed == fit.plan.needed
    for change in fit.changes:
        assert change.line in "\n".join(fit.toml())


def test_fewest_and_cheapest_changes():
    _, inputs = shipped("qwen2.5-0.5b-1gpu", "lora_rl.micro_batch_tokens=65536", "lora_rl.group_size=32")
    fit = nearest_fit(inputs, find_gpu("l4-24gb"))
    assert fit is not None
    assert [change.key for change in fit.changes] == ["micro_batch_tokens"]
    assert fit.changes[0].value == 32768  # the first halving that fits
    plain = nearest_fit(shipped("qwen2.5-0.5b-1gpu")[1], find_gpu("l4-24gb"))
    assert plain is not None
    assert plain.changes == ()


def test_nothing_fits_a_gpu_without_memory():
    inputs = plan_inputs(tiny_config())
    device = replace(find_gpu("l4-24gb"), memory_bytes=10**9)
    plan = make_plan(inputs, device)
    assert nearest_fit(inputs, device) is None
    text = render_plan(plan, None)
    assert "does not fit" in text
    assert "more or larger GPUs" in text
    assert plan.limits[0].where == "GPU"


def test_host_memory_limits_too():
    _, inputs = shipped("qwen2.5-72b-8x80gb")
    plan = make_plan(inputs, find_gpu("h100-80gb"), 8, host_bytes=400 * 10**9)
    assert {limit.where for limit in plan.limits} == {"host"}
    assert "lora_rl" in {limit.step for limit in plan.limits}


def test_counts_that_cannot_be():
    _, inputs = shipped("qwen2.5-72b-8x80gb", "lora_rl.distributed.processes=8")
    with pytest.raises(UserError, match="processes = 8, but the plan is for 4 GPUs"):
        make_plan(inputs, find_gpu("h100-80gb"), 4)
    with pytest.raises(UserError, match="tensor_parallel_size = 8"):
        make_plan(shipped("qwen2.5-72b-8x80gb")[1], find_gpu("h100-80gb"), 4)
    with pytest.raises(UserError, match="known: l4-24gb"):
        find_gpu("h100")


def test_time_follows_arithmetic_and_bandwidth():
    _, inputs = shipped("qwen2.5-0.5b-1gpu")
    gpu = find_gpu("h100-80gb")
    time = make_plan(inputs, gpu).time
    # an update trains 32 x (384 + 8 x 511) packed tokens; 4 operations a weight that multiplies (all but the tied
    # embedding, whose matrix is the head's), 6 an adapter weight, and attention
    tokens, adapter = 32 * (384 + 8 * 511), 17_596_416
    operations = tokens * (4 * 494e6 + 6 * adapter + 4 * 24 * 896 * (384 + 512))
    assert time.update["update"] == pytest.approx(operations / (0.4 * gpu.flops), rel=0.01)
    doubled = make_plan(inputs, replace(gpu, flops=2 * gpu.flops)).time
    assert doubled.update["update"] == pytest.approx(time.update["update"] / 2)
    assert time.run == pytest.approx(time.warm_up + 200 * time.update_seconds + time.evaluation)


def test_the_cpu_is_measured():
    cpu = measure_cpu(memory_bytes=10**9)
    assert cpu.is_cpu
    assert cpu.memory_bytes == 10**9
    assert cpu.flops > 1e9
    assert cpu.bandwidth > 1e8
    assert make_plan(plan_inputs(tiny_config()), measure_cpu()).fits


def test_check_refuses_what_cannot_fit(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text((PUBLISHED / "qwen2.5-7b-instruct.json").read_text())
    config, _ = shipped("qwen2.5-7b-8gpu")
    record, unsure = check_hardware(config, tmp_path)
    assert record is not None
    assert record["fits"]
    assert unsure == []
    assert json.loads(json.dumps(record)) == record
    small, _ = shipped("qwen2.5-7b-8gpu", "check.gpu='a100-40gb'")
    with pytest.raises(UserError, match=r"does not fit 8 x a100-40gb: .* in its update phase; .*; it fits with"):
        check_hardware(small, tmp_path)
    nameless, _ = shipped("qwen2.5-7b-8gpu", "check.gpu=''")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert check_hardware(nameless, tmp_path)[0] is None
    known, _ = shipped("qwen2.5-7b-8gpu", "check.gpu=''", "check.host_memory_bytes=8_000_000_000",
                       "lora_rl.engine={kind='torch'}", "lora_rl.distributed={processes=1}")  # fmt: skip
    with pytest.raises(UserError, match="does not fit this machine"):
        check_hardware(known, tmp_path)


def test_check_says_what_it_cannot_plan(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    record, unsure = check_hardware(tiny_config(), tmp_path)
    assert record is None
    assert "gpt2" in unsure[0]


def test_refusal_is_one_line():
    config = tiny_config()
    inputs = plan_inputs(config)
    plan = make_plan(inputs, Device("cpu", 10**8, 1e12, 1e11, 1e11, 1e11))
    assert "\n" not in refusal(plan, inputs, config)
    assert "smaller model" in refusal(plan, inputs, config)


def test_unknown_gpu_in_a_config():
    with pytest.raises(UserError, match=r"check.gpu: GPU kind 'h100' is not known"):
        tiny_config("check.gpu='h100'")


@pytest.mark.parametrize(
    ("name", "gpus", "overrides", "reason"),
    [
        ("qwen2.5-7b-8gpu", 8, ("lora_rl.engine.tensor_parallel_size=8",), "does not part the model's 28 query"),
        ("qwen2.5-0.5b-1gpu", 4, ("evaluate.engine={kind='vllm', tensor_parallel_size=4}",), "14 query"),
        ("qwen2.5-7b-8gpu", 8, ("lora.rank=700",), "rank 700 exceeds"),
        ("qwen2.5-7b-8gpu", 8, ("lora.rank=400", "lora_rl.rank_schedule={kind='spectrum'}"), "rank 800 exceeds"),
    ],
)
def test_what_vllm_would_refuse_is_refused_here(name, gpus, overrides, reason):
    with pytest.raises(UserError, match=reason):
        make_plan(shipped(name, *overrides)[1], find_gpu("h100-80gb"), gpus)


@pytest.mark.parametrize(
    ("name", "gpu", "overrides"),
    [
        ("qwen2.5-7b-8gpu", "a100-40gb", ("lora_rl.mode='full'", "lora_rl.engine={kind='torch'}",
                                          "lora_rl.distributed={zero_stage=1}")),
        ("qwen2.5-72b-8x80gb", "h100-80gb", ("evaluate.engine={kind='torch'}", "evaluate.harness={tasks=['gsm8k']}")),
        ("qwen2.5-72b-8x80gb", "h100-80gb", ("evaluate.engine={kind='torch'}", "evaluate.sampling.top_p=0.9")),
    ],
)  # fmt: skip
def test_what_a_config_may_not_say_is_no_advice(name, gpu, overrides):
    config, inputs = shipped(name, *overrides)
    fit = nearest_fit(inputs, find_gpu(gpu), 8)
    assert fit is not None  # which the config cannot have
    with pytest.raises(UserError):
        load_run_config(f"configs/{name}.toml", (*overrides, *(f"{c.table}.{c.line}" for c in fit.changes)))
    legal = nearest_fit(inputs, find_gpu(gpu), 8, allowed=may_change(config))
    if legal:
        load_run_config(f"configs/{name}.toml", (*overrides, *(f"{c.table}.{c.line}" for c in legal.changes)))


def test_a_host_that_is_nearly_full_is_tight():
    _, inputs = shipped("qwen2.5-7b-8gpu")
    host = max(step.host_peak.host_bytes for step in make_plan(inputs, find_gpu("h100-80gb"), 8).steps)
    assert make_plan(inputs, find_gpu("h100-80gb"), 8, host_bytes=int(1.01 * host)).is_tight
    assert not make_plan(inputs, find_gpu("h100-80gb"), 8, host_bytes=2 * host).is_tight


def test_the_command_names_what_fits_where_the_counts_do_not(capsys):
    assert main(["plan", "--config", "configs/qwen2.5-72b-8x80gb.toml", "--gpu", "h200-141gb", "--gpus", "4"]) == 2
    printed = capsys.readouterr().out
    assert "tensor_parallel_size = 8 does not divide 4 processes" in printed
    assert "tensor_parallel_size = " in printed


def test_the_command_plans_for_this_machines_cpu(capsys):
    command = ["plan", "--config", "configs/ci.toml", "--set", "check.host_memory_bytes=1000000000000", "--gpu", "cpu"]
    assert main(command) == 0
    assert "1,000.0 GB" not in capsys.readouterr().out  # which is another machine's
