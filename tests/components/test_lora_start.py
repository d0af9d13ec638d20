"""Automatic settings and adapters to start from, through the steps themselves; full fine-tuning alone and refused."""

import json
from pathlib import Path

import pytest

from components.auto import resolve_auto
from components.check.consistency import check_consistency
from components.check.step import STEP as CHECK
from components.data_prep.step import STEP as DATA_PREP
from components.lora_rl.step import STEP as LORA_RL
from components.runner import execute
from components.sft_warmup.step import STEP as SFT_WARMUP
from tests.s3_server import BUCKET, s3_server  # noqa: F401
from tests.tiny_run import tiny_config
from tuneloop.errors import UserError
from tuneloop.models.adapter_io import load_adapter
from tuneloop.models.adapter_source import adapter_rank, resolve_adapter
from tuneloop.registry import Registry
from tuneloop.storage import NotFound

ADAPTER = ("lora.rank=4", "lora.alpha=8", "lora.rank_pattern={q_proj=2}")
AUTO = (
    'lora.rank="auto"',
    'lora.init="svd"',
    'sft_warmup.optimizer.learning_rate="auto"',
    'lora_rl.optimizer.learning_rate="auto"',
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    output = str(tmp_path_factory.mktemp("data") / "data_prep")
    execute(DATA_PREP, tiny_config(), {}, output)
    return output


@pytest.fixture(scope="module")
def warmup(data: str, tmp_path_factory) -> Path:
    """A warmed-up adapter of two ranks."""
    output = tmp_path_factory.mktemp("warmup") / "sft_warmup"
    execute(SFT_WARMUP, tiny_config(*ADAPTER), {"data": data}, str(output))
    return output


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_auto_is_the_same_in_every_step_printed_and_recorded(data: str, tmp_path: Path, capsys):
    config = tiny_config(*AUTO)
    for step, inputs in ((CHECK, {}), (SFT_WARMUP, {"data": data})):
        execute(step, config, inputs, str(tmp_path / step.name))
    execute(LORA_RL, config, {"data": data, "warmup": str(tmp_path / "sft_warmup")}, str(tmp_path / "lora_rl"))
    printed = capsys.readouterr().out
    for step in ("check", "sft_warmup", "lora_rl"):
        assert f'{step}: lora.rank = "auto" is 32 for 107,456 parameters' in printed
    assert 'sft_warmup: sft_warmup.optimizer.learning_rate = "auto" is 0.00045' in printed
    assert 'lora_rl: lora_rl.optimizer.learning_rate = "auto" is 0.0001' in printed
    assert record(tmp_path / "check", "plan.json")["auto"] == {
        "lora.rank": 32, "sft_warmup.optimizer.learning_rate": 4.5e-4, "lora_rl.optimizer.learning_rate": 1e-4,
    }  # fmt: skip
    warmed = record(tmp_path / "sft_warmup", "warmup.json")
    assert (warmed["lora"]["rank"], warmed["learning_rate"], warmed["parameters"]) == (32, 4.5e-4, 107_456)
    trained = record(tmp_path / "lora_rl", "rl.json")
    assert (trained["learning_rate"], trained["reference_digest"]) == (1e-4, warmed["adapter_digest"])
    assert load_adapter(tmp_path / "lora_rl" / "adapter").config["r"] == 32


def test_check_writes_warnings(tmp_path: Path, capsys):
    execute(CHECK, tiny_config("lora.alpha=2048"), {}, str(tmp_path / "check"))
    [line] = record(tmp_path / "check", "plan.json")["warnings"]
    assert "alpha is 2048 at rank 4" in line
    assert f"check: warning: {line}" in capsys.readouterr().out


def test_warm_up_hands_an_existing_adapter_on(data: str, warmup: Path, tmp_path: Path):
    """Its ranks are taken over, its alpha need not be the same, and nothing of what it computes changes."""
    settings = (f"lora.start_from={warmup}", 'lora.rank="auto"', "lora.alpha=16", "sft_warmup.updates=0")
    execute(SFT_WARMUP, tiny_config(*settings), {"data": data}, str(tmp_path / "again"))
    before, after = load_adapter(warmup / "adapter"), load_adapter(tmp_path / "again" / "adapter")
    assert {a.shape[0] for a, _ in after.factors.values()} == {2, 4}
    for module, (a, b) in before.factors.items():
        theirs = after.factors[module]
        product = before.scaling(module) * (b @ a)
        assert float((product - after.scaling(module) * (theirs[1] @ theirs[0])).abs().max()) < 1e-7
    execute(
        LORA_RL,
        tiny_config(*settings),
        {"data": data, "warmup": str(tmp_path / "again")},
        str(tmp_path / "lora_rl"),
    )
    warmed = record(tmp_path / "again", "warmup.json")
    assert record(tmp_path / "lora_rl", "rl.json")["reference_digest"] == warmed["adapter_digest"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("lora.rank=8",), 'has rank 4 at .*set lora.rank = "auto"'),
        (("lora.rank=4", "lora.target_modules=['q_proj']"), "which lora.target_modules leaves out"),
        (("lora.rank=4", 'sft_warmup.mode="full"'), "start_from continues an adapter, but sft_warmup.mode"),
        (("lora.start_from=nowhere",), "lora.start_from nowhere: no such folder"),
        (("lora.start_from=registry:production", "promote.registry=$TMP"), "has no .* under that alias"),
    ],
)
def test_adapter_that_cannot_be_continued(data: str, warmup: Path, tmp_path: Path, settings, says):
    settings = [value.replace("$TMP", str(tmp_path / "registry")) for value in settings]
    config = tiny_config(f"lora.start_from={warmup}", *settings)
    with pytest.raises(UserError, match=says):
        execute(SFT_WARMUP, config, {"data": data}, str(tmp_path / "again"))


def test_check_looks_for_the_adapter_too(tmp_path: Path):
    with pytest.raises(UserError, match=r"lora\.start_from nowhere: no such folder"):
        execute(CHECK, tiny_config("lora.start_from=nowhere"), {}, str(tmp_path / "check"))


def test_adapter_of_a_registry_alias(warmup: Path, tmp_path: Path):
    registry = Registry(str(tmp_path / "registry"))
    version = registry.register("sums", warmup / "adapter", {"adapter_digest": "x", "base_uri": "tiny://a"}).version
    registry.promote("sums", version, "production", None)
    place = {"registry": str(tmp_path / "registry"), "adapter_name": "sums", "cache_dir": tmp_path / "cache"}
    folder = resolve_adapter("registry:production", base_uri="tiny://a", **place)
    assert load_adapter(folder).digest() == load_adapter(warmup / "adapter").digest()
    assert adapter_rank(folder) == 4
    assert resolve_adapter("registry:production", base_uri="tiny://a", **place) == folder
    with pytest.raises(UserError, match=r"version 1 was trained on tiny://a, not on model.uri = tiny://b"):
        resolve_adapter("registry:production", base_uri="tiny://b", **place)


def test_adapter_on_s3(s3_server, warmup: Path, tmp_path: Path):  # noqa: F811
    client = s3_server.client()
    for file in (warmup / "adapter").iterdir():
        client.upload_file(str(file), BUCKET, f"adapters/sums/{file.name}")
    folder = resolve_adapter(f"s3://{BUCKET}/adapters/sums", cache_dir=tmp_path)
    assert load_adapter(folder).digest() == load_adapter(warmup / "adapter").digest()
    with pytest.raises(NotFound, match="holds no files"):
        resolve_adapter(f"s3://{BUCKET}/adapters/none", cache_dir=tmp_path)


def test_folder_that_is_no_adapter(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json is damaged"):
        adapter_rank(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"not an adapter, adapter_config\.json is missing"):
        resolve_adapter(str(tmp_path))


def test_full_arm_runs_alone_and_leaves_a_model(data: str, warmup: Path, tmp_path: Path):
    config = tiny_config(*ADAPTER, 'lora_rl.mode="full"')
    execute(LORA_RL, config, {"data": data, "warmup": str(warmup)}, str(tmp_path / "full"))
    trained = record(tmp_path / "full", "rl.json")
    assert trained["mode"] == "full"
    assert len(trained["model_digest"]) == 64
    assert "adapter_digest" not in trained
    assert (tmp_path / "full" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "full" / "model" / "tokenizer.json").is_file()
    assert not (tmp_path / "full" / "adapter").exists()


def test_full_arm_is_refused_in_a_pipeline():
    with pytest.raises(UserError, match=r"registry are for adapters: run python -m components\.lora_rl alone"):
        check_consistency(tiny_config('lora_rl.mode="full"'))


def test_resolving_twice_changes_nothing():
    resolved = resolve_auto(tiny_config(*AUTO))
    assert resolve_auto(resolved) == resolved
