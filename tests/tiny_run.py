"""The smallest real run: a tiny model, one-digit sums."""

from pathlib import Path

from components.config import RunConfig, load_run_config

TOML = """
name = "tiny"
seed = 3

[model]
uri = "tiny://qwen2?seed=0"
dtype = "float32"
max_length = 160

[task]
max_new_tokens = 8

[[task.rewards]]
kind = "exact"

[lora]
rank = 4

[check]
min_free_disk_bytes = 1_000_000

[data_prep]
max_prompt_tokens = 144
max_completion_tokens = 16
near_duplicates.enabled = false

[[data_prep.sources]]
kind = "reasoning_gym"
task = "chain_sum"
size = 300
seed = 1
options = { min_terms = 2, max_terms = 2, min_digits = 1, max_digits = 2 }

[sft_warmup]
updates = 2
examples_per_update = 8

[lora_rl]
updates = 2
prompts_per_update = 4
group_size = 2
validation_prompts = 4
kept_prompts = 1

[evaluate]
prompts = 20
min_prompts = 4
samples = 2
pass_k = [1, 2]

[merge_adapter]
probe_prompts = 2
"""


def tiny_toml(folder: Path) -> Path:
    """Write the config into `folder`."""
    path = folder / "tiny.toml"
    path.write_text(TOML)
    return path


def tiny_config(*overrides: str) -> RunConfig:
    """The config with `section.key=value` overrides."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return load_run_config(tiny_toml(Path(folder)), overrides)
