"""Promotion happens once, only when the gate passed, and only over the incumbent that evaluate compared with."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from components.config import RunConfig, load_run_config
from components.promote.step import STEP
from components.runner import execute
from components.step_command import main
from tests.s3_server import BUCKET, s3_server  # noqa: F401
from tuneloop.config import config_digest, resolved_json
from tuneloop.errors import GateRefused, UserError
from tuneloop.models.adapter_io import Adapter, load_adapter, save_adapter
from tuneloop.registry import AliasMoved, Registry
from tuneloop.storage import LocalStorage

DEMO = Path(__file__).parents[2] / "configs" / "demo.toml"
ACCURACY = {"value": 0.75, "n": 64, "ci95": [0.64, 0.85]}


def config_for(registry: str) -> RunConfig:
    return load_run_config(DEMO, (f"promote.registry='{registry}'", "promote.adapter_name='sums'"))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return config_for(str(tmp_path / "registry"))


@pytest.fixture
def registry(config: RunConfig) -> Registry:
    return Registry(config.promote.registry)


def run_outputs(folder: Path, seed: int, *, incumbent: dict | None = None, passed: bool = True) -> dict[str, str]:
    """What the steps before promote leave behind, for an adapter of its own."""
    random = torch.Generator().manual_seed(seed)
    factors = (torch.randn(2, 8, generator=random), torch.randn(8, 2, generator=random))
    adapter = Adapter({"model.layers.0.mlp.up_proj": factors}, {"peft_type": "LORA", "r": 2, "lora_alpha": 2.0})
    save_adapter(adapter, folder / "lora_rl" / "adapter")
    evaluation = {
        "models": {"base": {"accuracy": {**ACCURACY, "value": 0.25}}, "candidate": {"accuracy": ACCURACY}},
        "adapter_digest": adapter.digest(),
        "incumbent": incumbent,
        "gate": {"passed": passed, "reason": "p = 0.2 is above 0.01" if not passed else "better", "p_value": 0.001},
    }
    files = {
        "lora_rl/rl.json": {"adapter_digest": adapter.digest(), "base_uri": "bundled://base"},
        "merge_adapter/merge.json": {"adapter_digest": adapter.digest()},
        "data_prep/data_card.json": {"fingerprint": "f" * 64},
        "evaluate/evaluation.json": evaluation,
    }
    for name, values in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(values))
    names = {"training": "lora_rl", "evaluation": "evaluate", "data": "data_prep", "merge": "merge_adapter"}
    return {name: str(folder / step) for name, step in names.items()}


def named(registry: Registry) -> dict | None:
    found = registry.resolve("sums")
    return {"version": found.version, "adapter_digest": found.record["adapter_digest"]} if found else None


def promotion(output: Path) -> dict:
    return json.loads((output / "promotion.json").read_text())


def test_the_first_adapter_is_registered_and_promoted(config, registry, tmp_path):
    inputs = run_outputs(tmp_path / "run", seed=1)
    result = execute(STEP, config, inputs, str(tmp_path / "promote"))
    assert result.summary == {"promoted": True, "version": 1, "previous_version": None}
    assert promotion(tmp_path / "promote") == {
        "promoted": True, "adapter_name": "sums", "version": 1, "alias": "production", "previous_version": None,
        "reason": "better"}  # fmt: skip
    version = registry.resolve("sums")
    assert version is not None
    record = dict(version.record)
    digest = load_adapter(version.fetch_adapter(tmp_path / "fetched")).digest()
    assert digest == load_adapter(Path(inputs["training"]) / "adapter").digest() == record["adapter_digest"]
    assert record["config_digest"] == config_digest(config)
    assert (record["base_uri"], record["data_fingerprint"], record["parent"]) == ("bundled://base", "f" * 64, None)
    assert record["evaluation"]["accuracy"]["candidate"] == ACCURACY
    assert record["evaluation"]["gate"]["passed"] is True


def test_the_next_one_is_promoted_over_its_parent_and_can_be_rolled_back(config, registry, tmp_path):
    execute(STEP, config, run_outputs(tmp_path / "1", seed=1), str(tmp_path / "1" / "promote"))
    inputs = run_outputs(tmp_path / "2", seed=2, incumbent=named(registry))
    execute(STEP, config, inputs, str(tmp_path / "2" / "promote"))
    assert promotion(tmp_path / "2" / "promote")["previous_version"] == 1
    assert registry.show("sums", 2).record["parent"] == 1
    assert registry.rollback("sums").version == 1


def test_a_refused_candidate_leaves_nothing_behind(config, tmp_path, capsys):
    inputs = run_outputs(tmp_path / "run", seed=1, passed=False)
    with pytest.raises(GateRefused, match=r"p = 0\.2 is above 0\.01"):
        execute(STEP, config, inputs, str(tmp_path / "promote"))
    assert not Path(config.promote.registry).exists()
    assert not (tmp_path / "promote").exists()
    (tmp_path / "config.json").write_text(resolved_json(config))
    options = [f"--{name}={path}" for name, path in inputs.items()]
    before = signal.getsignal(signal.SIGTERM)
    code = main(STEP, ["--config", str(tmp_path / "config.json"), *options, "--output", str(tmp_path / "promote")])
    signal.signal(signal.SIGTERM, before)
    assert code == 3
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("had_incumbent", [False, True])
def test_an_alias_that_moved_since_evaluate_is_not_overwritten(config, registry, tmp_path, had_incumbent):
    if had_incumbent:
        execute(STEP, config, run_outputs(tmp_path / "1", seed=1), str(tmp_path / "1" / "promote"))
    ours = run_outputs(tmp_path / "ours", seed=2, incumbent=named(registry))
    theirs = run_outputs(tmp_path / "theirs", seed=3, incumbent=named(registry))
    execute(STEP, config, theirs, str(tmp_path / "theirs" / "promote"))
    winner = named(registry)
    with pytest.raises(AliasMoved, match=r"now names version \d \(moved by .*run again from evaluate"):
        execute(STEP, config, ours, str(tmp_path / "ours" / "promote"))
    assert named(registry) == winner
    assert len(registry.versions("sums")) == 1 + had_incumbent, "a version was stored with a stale evaluation"
    again = run_outputs(tmp_path / "again", seed=2, incumbent=winner)
    execute(STEP, config, again, str(tmp_path / "again" / "promote"))
    assert promotion(tmp_path / "again" / "promote")["previous_version"] == (winner or {})["version"]


def _promote_and_die(config: RunConfig, inputs: dict[str, str], output: Path, puts: int) -> None:
    """Promote, and be gone after so many puts."""

    def dying(put):
        def counted(*arguments, **named):
            nonlocal puts
            if puts == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            puts -= 1
            return put(*arguments, **named)

        return counted

    for method in ("put_file", "write_bytes"):
        setattr(LocalStorage, method, dying(getattr(LocalStorage, method)))
    torch.set_num_threads(1)
    execute(STEP, config, inputs, str(output))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("puts", range(8))  # claim, its proof, two files, version.json, another proof, alias; 7: end
def test_killed_at_any_put_the_same_command_finishes_the_job(config, registry, tmp_path, puts):
    execute(STEP, config, run_outputs(tmp_path / "1", seed=1), str(tmp_path / "1" / "promote"))
    inputs = run_outputs(tmp_path / "2", seed=2, incumbent=named(registry))
    output = tmp_path / "2" / "promote"
    child = multiprocessing.get_context("fork").Process(target=_promote_and_die, args=(config, inputs, output, puts))
    child.start()
    child.join()
    assert child.exitcode == -9
    assert (named(registry) or {})["version"] == (2 if puts == 7 else 1)
    if puts == 7:  # the step had finished: take its output away, as if it had been killed just before
        (output / "step.json").unlink()
        output.rename(output.with_name("promote.partial"))
    execute(STEP, config, inputs, str(output))
    assert promotion(output) == {**promotion(output), "version": 2, "previous_version": 1}
    assert registry.versions("sums") == [1, 2]
    assert registry.rollback("sums").version == 1


def test_on_s3(s3_server, tmp_path):  # noqa: F811
    config = config_for(f"s3://{BUCKET}/registry")
    execute(STEP, config, run_outputs(tmp_path / "1", seed=1), str(tmp_path / "1" / "promote"))
    assert (named(Registry(config.promote.registry)) or {})["version"] == 1


def _edit(path: str, **changes: object) -> None:
    file = Path(path)
    values = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in {**values, **changes}.items() if value != "gone"}))


def test_inputs_that_do_not_belong_together_are_refused(config, tmp_path):
    cases = {
        "another merge": ("merge", "merge.json", {"adapter_digest": "0" * 64}, "merge.json: is about another adapter"),
        "another evaluation": (
            "evaluation",
            "evaluation.json",
            {"adapter_digest": "0" * 64},
            "is about another adapter",
        ),
        "another training": ("training", "rl.json", {"adapter_digest": "0" * 64}, "rl.json: is about another adapter"),
        "no base": ("training", "rl.json", {"base_uri": None}, "rl.json: says nothing usable about 'base_uri'"),
        "no fingerprint": ("data", "data_card.json", {"fingerprint": "gone"}, "data_card.json: says nothing usable"),
        "no incumbent": ("evaluation", "evaluation.json", {"incumbent": "gone"}, "'incumbent'; run evaluate again"),
        "no gate": ("evaluation", "evaluation.json", {"gate": "gone"}, "'gate'; run evaluate again"),
        "no models": ("evaluation", "evaluation.json", {"models": []}, "'models'; run evaluate again"),
        "bad incumbent": ("evaluation", "evaluation.json", {"incumbent": {"x": 1}}, "'version'; run evaluate again"),
    }
    for case, (name, file, changes, message) in cases.items():
        inputs = run_outputs(tmp_path / case, seed=1)
        _edit(f"{inputs[name]}/{file}", **changes)
        with pytest.raises(UserError, match=message):
            execute(STEP, config, inputs, str(tmp_path / case / "promote"))
        assert not (tmp_path / case / "promote").exists()
    for name, file in (("evaluation", "evaluation.json"), ("merge", "merge.json"), ("training", "rl.json")):
        inputs = run_outputs(tmp_path / file, seed=1)
        (Path(inputs[name]) / file).write_text("{oops")
        with pytest.raises(UserError, match=f"{file}: missing or damaged"):
            execute(STEP, config, inputs, str(tmp_path / file / "promote"))
    assert not Path(config.promote.registry).exists()


def test_another_registry_than_evaluate_used_is_refused(config, registry, tmp_path):
    execute(STEP, config, run_outputs(tmp_path / "1", seed=1), str(tmp_path / "1" / "promote"))
    foreign = run_outputs(tmp_path / "2", seed=2, incumbent={"version": 1, "adapter_digest": "0" * 64})
    with pytest.raises(UserError, match="not the incumbent that evaluate compared with"):
        execute(STEP, config, foreign, str(tmp_path / "2" / "promote"))
    foreign = run_outputs(tmp_path / "3", seed=2, incumbent={"version": 9, "adapter_digest": "0" * 64})
    with pytest.raises(UserError, match="has no version 9; it has: 1"):
        execute(STEP, config, foreign, str(tmp_path / "3" / "promote"))
    assert registry.versions("sums") == [1]


def test_a_registry_that_is_a_file_is_a_user_error(config, tmp_path):
    Path(config.promote.registry).write_text("x")
    with pytest.raises(UserError, match="is a file"):
        execute(STEP, config, run_outputs(tmp_path / "run", seed=1), str(tmp_path / "promote"))
