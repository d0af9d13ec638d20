"""`report.json`: the run in one small file, and the same numbers for a pipeline's console."""

from pathlib import Path
from typing import Any

from tuneloop.report.comparison import interval_of, score
from tuneloop.report.number import finite
from tuneloop.report.run_record import MODELS, STEPS, RunRecord, dig, read_run


def outcome(run: RunRecord) -> dict[str, Any]:
    """The content of `report.json`; what the run did not reach is null."""
    gate = dig(run.evaluation, "gate")
    return {
        "run": run.name,
        "status": run.status,
        "error": run.failure.message if run.failure else None,
        "accuracy": {model: _accuracy(run, model) for model in MODELS},
        "gate": {key: gate.get(key) for key in ("passed", "reason", "p_value")} if gate else None,
        "seconds": {name: run.steps[name].seconds for name in STEPS},
        "peak_rss_bytes": {name: run.steps[name].peak_rss_bytes for name in STEPS},
        "adapter_digest": run.rl.get("adapter_digest"),
        "config_digest": run.config_digest,
    }


def report_metrics(run_folder: Path) -> dict[str, float]:
    """The run's numbers under flat names, for `Output[Metrics]`: `accuracy_candidate`, `seconds_lora_rl`, ….

    Args:
        run_folder: a run folder, finished or not; numbers that it lacks are left out.

    Raises:
        UserError: there is no such folder.
    """
    told = outcome(read_run(run_folder))
    numbers: dict[str, Any] = {f"accuracy_{model}": dig(told, "accuracy", model, "value") for model in MODELS}
    numbers["gate_passed"] = {True: 1.0, False: 0.0}.get(dig(told, "gate", "passed"))
    numbers["gate_p_value"] = dig(told, "gate", "p_value")
    for kind in ("seconds", "peak_rss_bytes"):
        numbers |= {f"{kind}_{step}": value for step, value in told[kind].items()}
    return {name: number for name, value in numbers.items() if (number := finite(value)) is not None}


def _accuracy(run: RunRecord, model: str) -> dict[str, Any] | None:
    held = score(run, model)
    value = finite(held.get("value"))
    if value is None:
        return None
    interval = interval_of(held.get("ci95"))
    return {"value": value, "n": held.get("n"), "ci95": list(interval) if interval else None}
