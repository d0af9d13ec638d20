"""Every metric that training emits is in docs/metrics.md, and every one that is there is emitted by something."""

import json
import re
from pathlib import Path

import pytest

from components.lora_rl.step import STEP as LORA_RL
from components.runner import execute
from components.sft_warmup.step import STEP as SFT_WARMUP
from tests.prepared_data import write_prepared
from tests.tiny_run import tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]
NAME = re.compile(r"`([a-z_]+(?:/[a-z0-9_<>]+)+|entropy|learning_rate|time)`")
VARIANTS = {  # together they emit almost everything
    "grpo": (),
    "kl": ("lora_rl.algorithm.kl_coefficient=0.1",),
    "ppo": ("lora_rl.algorithm.name='ppo'",),
    "flowrl": ("lora_rl.algorithm.name='flowrl'",),
    "ranks": ("lora_rl.rank_schedule={kind='spectrum', every=1}",),
}


def documented() -> set[str]:
    return set(NAME.findall((REPOSITORY / "docs" / "metrics.md").read_text()))


def names_in(folder: Path) -> set[str]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {name for row in rows for name in row} - {"update"}


@pytest.fixture(scope="module")
def emitted(tmp_path_factory) -> set[str]:
    """Names of real runs: one warm-up, and RL in several ways."""
    run = tmp_path_factory.mktemp("run")
    data = str(write_prepared(run / "data_prep"))
    # Random text matches now and then: rewards differ within groups, so there is something to learn from.
    base = ("task.rewards=[{kind='format', pattern='[\\s\\S]*[a-m][\\s\\S]*'}]", "lora_rl.group_size=8")
    execute(SFT_WARMUP, tiny_config(*base), {"data": data}, str(run / "sft_warmup"))
    names = names_in(run / "sft_warmup")
    for variant, overrides in VARIANTS.items():
        output = run / variant
        inputs = {"data": data, "warmup": str(run / "sft_warmup")}
        execute(LORA_RL, tiny_config(*base, *overrides), inputs, str(output))
        names |= names_in(output)
    return names


def test_what_is_emitted_is_documented(emitted):
    assert "gradient/norm" in emitted
    assert {name.replace("reward/format/", "reward/<name>/") for name in emitted} - documented() == set()


def test_what_is_documented_is_emitted(emitted):
    source = "\n".join(path.read_text() for path in (REPOSITORY / "tuneloop").rglob("*.py"))
    unknown = [
        name for name in documented() if name.replace("<name>", "format") not in emitted and f'"{name}"' not in source
    ]
    assert unknown == []
