"""`python -m pipelines plan`."""

import json
import subprocess
import sys

from pipelines.cli import main
from tuneloop.plan.shapes import PUBLISHED

SMALL = ["plan", "--config", "configs/qwen2.5-0.5b-1gpu.toml"]


def test_table_and_exit_code(capsys):
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    assert "qwen2.5-0.5b-1gpu: 494M parameters in bfloat16, 168 adapted modules" in out
    assert "1 x rtx4090-24gb (25.8 GB each): fits" in out
    assert "sft_warmup" in out
    assert main([*SMALL, "--set", "lora_rl.micro_batch_tokens=131072", "--set", "lora_rl.group_size=64"]) == 2
    out = capsys.readouterr().out
    assert "does not fit" in out
    assert "[lora_rl]" in out


def test_json_for_several_kinds(capsys):
    assert main([*SMALL, "--gpu", "l4-24gb", "h100-80gb", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [plan["device"] for plan in found["plans"]] == ["l4-24gb", "h100-80gb"]
    first = found["plans"][0]
    assert first["fits"]
    assert first["nearest"] is None
    update = first["steps"]["lora_rl"]["phases"]["update"]
    assert sum(update.values()) <= first["steps"]["lora_rl"]["gpu_bytes"] < first["memory_bytes"]
    assert set(first["seconds"]["update"]) == {"sample", "score", "update", "sync", "total"}


def test_all_kinds_and_the_cpu(capsys):
    assert main(["plan", "--config", "configs/demo.toml", "--gpu", "all", "cpu", "--host-memory", "64"]) == 0
    out = capsys.readouterr().out
    assert "b200-180gb" in out
    assert "CPU (64.0 GB): fits" in out


def test_a_model_that_is_not_here(capsys, tmp_path):
    config = [*SMALL, "--set", "model.uri=s3://bucket/model"]
    assert main(config) == 2
    assert "--model-config FILE" in capsys.readouterr().err
    copy = tmp_path / "config.json"
    copy.write_text((PUBLISHED / "qwen2.5-7b-instruct.json").read_text())
    assert main([*config, "--model-config", str(copy), "--gpu", "h100-80gb"]) == 0
    assert "7.62B parameters" in capsys.readouterr().out


def test_mistakes(capsys):
    assert main([*SMALL, "--gpu", "h100"]) == 2
    assert "known: l4-24gb" in capsys.readouterr().err
    assert main(["plan", "--config", "configs/qwen2.5-72b-8x80gb.toml", "--gpus", "3"]) == 2
    assert "tensor_parallel_size = 8" in capsys.readouterr().out


def test_imports_neither_torch_nor_kfp():
    code = (
        "import sys; from pipelines.cli import main; main(['plan', '--config', 'configs/qwen2.5-72b-8x80gb.toml']);"
        "sys.exit(bool({'torch', 'kfp', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0
