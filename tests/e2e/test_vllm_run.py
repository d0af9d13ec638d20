"""The whole pipeline with vLLM in rollouts and in evaluation, from a fresh adapter: what large models need."""

import json
import subprocess
import sys
from pathlib import Path

from tests.vllm_here import needs_vllm

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = (
    "model.uri='tiny://qwen2?seed=0&heads=2&kv_heads=1'",  # heads of 32: vLLM's CPU kernels know none of 16
    "task.rewards=[{kind='format', pattern='(?s).*[a-z].*'}]",  # what random weights say has one now and then
    "sft_warmup.updates=0",  # no weights are read
    "lora_rl.updates=2",
    "lora_rl.prompts_per_update=4",
    "lora_rl.validation_prompts=8",
    "lora_rl.engine={kind='vllm', max_sequences=16, kv_cache_bytes=50_000_000}",
    "evaluate.engine={kind='vllm', kv_cache_bytes=50_000_000}",
    "evaluate.max_sequences=16",
    "evaluate.samples=1",
    "evaluate.pass_k=[1]",
)


@needs_vllm
def test_the_pipeline_runs_with_vllm_throughout(tmp_path):
    command = [sys.executable, "-m", "pipelines", "run", "--config", str(REPOSITORY / "configs" / "ci.toml")]
    command += ["--output", str(tmp_path / "runs"), "--run", "whole"]
    for setting in (*SETTINGS, f"promote.registry={str(tmp_path / 'registry')!r}"):
        command += ["--set", setting]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    folder = tmp_path / "runs" / "whole"
    assert (folder / "report.json").exists(), done.stdout + done.stderr
    evaluation = json.loads((folder / "evaluate" / "evaluation.json").read_text())
    assert {"base", "sft", "candidate"} <= set(evaluation["models"])
    report = json.loads((folder / "report.json").read_text())
    assert done.returncode == (0 if report["gate"]["passed"] else 3), done.stdout + done.stderr
    assert "vllm" in (folder / "report" / "report.html").read_text()
