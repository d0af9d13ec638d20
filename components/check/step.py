"""The check step: everything that can be known without a GPU is verified before one is asked for."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from components.auto import announce, chosen, warnings
from components.check.consistency import check_consistency
from components.check.hardware import check_hardware
from components.check.model import check_model
from components.check.places import check_places
from components.check.plan import make_plan
from components.check.sources import check_rewards, check_sources
from components.config import RunConfig
from components.runner import Step, Summary
from tuneloop.evaluation.lm_harness import task_manager


def run(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Summary:
    """Refuse a run that cannot work: settings that contradict each other, a model, data or reward that is not there,
    too little memory, a registry or disk that cannot be written. Writes plan.json, what the run will need."""
    check_consistency(config)
    unverified = check_sources(config.data_prep.sources, config.task)
    check_rewards(config)
    if config.evaluate.harness and find_spec("torch"):
        task_manager(config.evaluate.harness)
    elif config.evaluate.harness:  # as in an image without torch: evaluate runs in another one
        unverified = [*unverified, "evaluate.harness: its tasks are looked up where evaluate runs"]
    model = check_model(config)
    plan = make_plan(config, model)
    hardware, unsure = check_hardware(config, model.folder)
    unverified = [*unverified, *unsure]
    free = check_places(config, output, plan["disk_bytes"]["total"])
    announce("check", config, model.config, model.parameters, "sft_warmup", "lora_rl")
    plan |= {
        "free_disk_bytes": free,
        "unverified": unverified,
        "hardware": hardware,
        "auto": chosen(config, model.config),
        "warnings": warnings(model.config, model.parameters),
    }
    (output / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    for line in unverified:
        print(f"check: not verified: {line}", flush=True)
    return {
        "parameters": plan["parameters"],
        "adapter_parameters": plan["adapter_parameters"],
        "target_modules": plan["target_modules"],
        "memory_bytes": plan["memory_bytes"]["total"],
        "disk_bytes": plan["disk_bytes"]["total"],
    }


STEP = Step("check", (), run, sections=tuple(name for name in RunConfig.model_fields if name != "cluster"))
