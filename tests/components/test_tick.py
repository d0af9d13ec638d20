"""What a schedule's tick makes of a config: its window of days, its start, and whether there is anything to train."""

import json
from datetime import date, datetime

import pytest

from components.data_prep.step import STEP as DATA_PREP
from components.parameters import resolve_parameters
from components.runner import execute
from components.tick import resolve_tick, window
from tests.report_run import make_run
from tests.tiny_run import tiny_config
from tuneloop.errors import UserError
from tuneloop.models.adapter_io import load_adapter
from tuneloop.registry import Registry
from tuneloop.report import build_report

ROW = json.dumps({"prompt": "two and two", "answer": "four"})


def test_window_is_the_whole_days_before_the_tick():
    due = datetime.fromisoformat("2026-11-23T03:00:00Z")
    assert window(due, 3) == [date(2026, 11, 20), date(2026, 11, 21), date(2026, 11, 22)]
    assert window(datetime.fromisoformat("2026-03-01T00:30:00+02:00"), 1) == [date(2026, 2, 27)]  # the 28th in UTC


def windowed(folder, *sets):
    uri = f"{folder}/{{day:%Y/%m-%d}}.jsonl"
    return tiny_config("data_prep.sources=[" + f'{{kind="jsonl", uri="{uri}"}}' + "]", *sets)


def test_source_stands_for_each_day_that_has_data(tmp_path, capsys):
    for day in ("11-20", "11-22"):
        (tmp_path / "2026").mkdir(exist_ok=True)
        (tmp_path / "2026" / f"{day}.jsonl").write_text(ROW)
    config = windowed(tmp_path, "retrain.window_days=3")
    resolved = resolve_tick(config, "2026-11-23T03:00:00Z")
    assert [source.uri for source in resolved.data_prep.sources] == [
        f"{tmp_path}/2026/11-20.jsonl", f"{tmp_path}/2026/11-22.jsonl",
    ]  # fmt: skip
    assert "no data at" in capsys.readouterr().out
    assert resolve_tick(resolved, "2026-12-24T03:00:00Z") == resolved  # resolved once, for good


def test_window_without_data_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no data in the window of 1 days \(retrain.window_days\)"):
        resolve_tick(windowed(tmp_path), "2026-11-23T03:00:00Z")


def test_time_is_read_strictly(tmp_path):
    with pytest.raises(UserError, match="expected ISO 8601"):
        resolve_tick(windowed(tmp_path), "tomorrow")


def test_parameter_of_the_form_resolves_the_tick(tmp_path):
    (tmp_path / "2026").mkdir()
    (tmp_path / "2026" / "11-22.jsonl").write_text(ROW)
    text = json.dumps(windowed(tmp_path).model_dump(mode="json"))
    resolved = resolve_parameters(text, {"schedule_time": "2026-11-23T03:00:00Z"})
    assert resolved.data_prep.sources[0].uri.endswith("2026/11-22.jsonl")
    assert "{day" in resolve_parameters(text, {}).data_prep.sources[0].uri


# The incumbent


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(str(tmp_path / "registry"))


def promote(registry: Registry, folder, config, **record) -> int:
    """Make the tiny adapter of a warm-up the incumbent."""
    from components.sft_warmup.step import STEP as SFT_WARMUP

    execute(DATA_PREP, config, {}, str(folder / "data"))
    execute(SFT_WARMUP, config, {"data": str(folder / "data")}, str(folder / "warmup"))
    adapter = folder / "warmup" / "adapter"
    card = json.loads((folder / "data" / "data_card.json").read_text())
    told = {
        "adapter_digest": load_adapter(adapter).digest(),
        "base_uri": config.model.uri,
        "data_fingerprint": card["fingerprint"],
        **record,
    }
    version = registry.register(config.promote.adapter_name, adapter, told).version
    registry.promote(config.promote.adapter_name, version, "production", None)
    return version


def test_warm_start_continues_the_incumbent_of_that_moment(tmp_path, registry):
    config = tiny_config("retrain.warm_start=true", f"promote.registry={tmp_path / 'registry'}")
    assert resolve_tick(config, "").lora.start_from == ""  # no incumbent yet
    promote(registry, tmp_path, tiny_config(f"promote.registry={tmp_path / 'registry'}"))
    resolved = resolve_tick(config, "")
    assert resolved.lora.start_from == f"{tmp_path / 'registry'}/{config.promote.adapter_name}/versions/1"
    from components.auto import start_folder

    assert load_adapter(start_folder(resolved)).digest() == load_adapter(tmp_path / "warmup" / "adapter").digest()


def test_incumbent_of_another_base_is_no_start(tmp_path, registry):
    config = tiny_config("retrain.warm_start=true", f"promote.registry={tmp_path / 'registry'}")
    promote(registry, tmp_path, tiny_config(), base_uri="tiny://other")
    with pytest.raises(UserError, match=r"retrain.warm_start: .* was trained on tiny://other"):
        resolve_tick(config, "")


def test_unchanged_data_is_noticed(tmp_path, registry, capsys):
    sets = ("retrain.skip_unchanged=true", f"promote.registry={tmp_path / 'registry'}")
    config = tiny_config(*sets)
    assert execute(DATA_PREP, config, {}, str(tmp_path / "first")).summary["changed"] is True  # no incumbent
    promote(registry, tmp_path, config)
    assert execute(DATA_PREP, config, {}, str(tmp_path / "again")).summary["changed"] is False
    assert "nothing to train" in capsys.readouterr().out
    registry_of_another_base = tmp_path / "other base"
    promote(Registry(str(registry_of_another_base)), tmp_path, config, base_uri="tiny://other")
    rebased = tiny_config("retrain.skip_unchanged=true", f"promote.registry={registry_of_another_base}")
    assert execute(DATA_PREP, rebased, {}, str(tmp_path / "rebased")).summary["changed"] is True
    other = tiny_config(*sets, "data_prep.test_share=0.3")
    assert execute(DATA_PREP, other, {}, str(tmp_path / "other")).summary["changed"] is True
    always = tiny_config(f"promote.registry={tmp_path / 'registry'}")
    assert execute(DATA_PREP, always, {}, str(tmp_path / "always")).summary["changed"] is True


def test_report_of_a_skipped_run(tmp_path):
    run = make_run(tmp_path / "run")
    result = json.loads((run / "data_prep" / "step.json").read_text())
    result["summary"] |= {"changed": False}
    (run / "data_prep" / "step.json").write_text(json.dumps(result))
    import shutil

    for step in ("sft_warmup", "lora_rl", "merge_adapter", "evaluate", "promote"):
        shutil.rmtree(run / step)
    files = build_report(run)
    told = json.loads(files.summary.read_text())
    assert (told["status"], told["error"]) == ("skipped", None)
    assert "Nothing new to train on" in files.html.read_text()


# The run folder of a tick


def test_run_folder_of_a_tick():
    from components.node import run_folder

    assert run_folder("s3://b/runs/first", "2026-11-23T03:00:00Z") == "s3://b/runs/first"
    assert run_folder("s3://b/{schedule_time}", "2026-11-23T04:00:00+01:00") == "s3://b/20261123T030000Z"
    for due in ("", "{{$.pipeline_job_schedule_time_utc}}"):  # alone, and where the backend leaves its placeholder
        with pytest.raises(UserError, match="this run has none; name a folder"):
            run_folder("s3://b/{schedule_time}", due)


def test_steps_of_a_tick_share_its_folder(tmp_path):
    from components.node import run_in_pipeline

    text = json.dumps(tiny_config(f"promote.registry={tmp_path / 'registry'}").model_dump(mode="json"))
    uri = run_in_pipeline("check", config=text, output_uri=f"{tmp_path}/{{schedule_time}}", due="2026-11-23T03:00:00Z")
    assert uri == f"{tmp_path}/20261123T030000Z/check"
    assert (tmp_path / "20261123T030000Z" / "check" / "step.json").is_file()
