"""One engine for two processes over gloo gives each what an engine of its own would."""

import json
import subprocess
import sys
from pathlib import Path

import torch

from tests.numerics.led_engine_work import BASE, PROMPTS, sample
from tuneloop.models.adapter_io import Adapter, save_adapter
from tuneloop.models.load import load_model
from tuneloop.models.lora import attach, extract, peft_config
from tuneloop.models.sources import resolve_model
from tuneloop.rollout.torch_engine import TorchEngine
from tuneloop.settings import LoraSettings

REPOSITORY = Path(__file__).resolve().parents[2]


def test_each_process_gets_its_own_prompts_answers_and_everybody_the_errors(tmp_path: Path):
    model = load_model(resolve_model(BASE), "float32", "cpu")
    settings = LoraSettings(rank=4, alpha=8.0)
    layers = attach(model, settings, seed=1)
    for layer in layers.values():
        layer.B.data.normal_(std=0.2, generator=torch.Generator().manual_seed(2))
    adapter = extract(layers, peft_config(settings, layers, model, "test"))
    save_adapter(adapter, tmp_path / "adapter")
    misfit = {name: (a[:, :-1], b) for name, (a, b) in adapter.factors.items()}
    save_adapter(Adapter(misfit, adapter.config), tmp_path / "misfit")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.numerics.led_engine_work", str(rank), str(tmp_path)], cwd=REPOSITORY
        )
        for rank in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    given = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]

    alone = TorchEngine(resolve_model(BASE), dtype="float32", device="cpu")
    alone.sync(adapter)
    assert given[0]["sampled"] == sample(alone, [0, 2])
    assert given[1]["sampled"] == sample(alone, [1])
    for process in given:
        assert process["digest"] == adapter.digest()
        assert process["logprobs"] == alone.logprobs([(PROMPTS[0], PROMPTS[2])])
        assert "has another shape" in process["error"]
