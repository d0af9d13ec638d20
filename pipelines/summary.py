"""What a person wants to know when a run has ended: accuracies, the gate's reason, where things are."""

import json
from pathlib import Path
from typing import Any

from tuneloop.errors import EXIT_GATE_REFUSED, EXIT_OK, TuneloopError, UserError
from tuneloop.report import report_of
from tuneloop.storage import join_uri

MODELS = ("base", "sft", "candidate", "incumbent")


def summary(folder: Path, run: str) -> str:
    """The end of a complete run, as a few lines of text.

    Args:
        folder: holds what it reads.
        run: the run folder or URI, as the lines name it.
    """
    if skipped(folder):
        return f"skipped: the data is what the incumbent was trained on\n{report_line(run)}"
    evaluation = _read(folder / "evaluate" / "evaluation.json")
    lines = [f"{'model':<12}{'accuracy':>9}   95 % interval"]
    for name in MODELS:
        if name in evaluation["models"]:
            accuracy = evaluation["models"][name]["accuracy"]
            low, high = accuracy["ci95"]
            lines.append(f"{name:<12}{accuracy['value']:>9.1%}   {low:.1%} to {high:.1%} of {accuracy['n']} prompts")
    gate = evaluation["gate"]
    lines.append(f"gate: {'passed' if gate['passed'] else 'not passed'}: {gate['reason']}")
    if gate["passed"]:
        if not (folder / "promote").exists():
            raise RuntimeError("the gate passed, and the pipeline did not run promote")
        promotion = _read(folder / "promote" / "promotion.json")
        named = f"{promotion['adapter_name']} version {promotion['version']}"
        lines.append(f"promoted: {named} is now {promotion['alias']}")
    lines.append(f"adapter: {join_uri(run, 'lora_rl/adapter')}")
    return "\n".join([*lines, report_line(run)])


def report_line(run: str) -> str:
    """Where the report of a run folder or URI is."""
    return f"report: {join_uri(run, 'report/report.html')}"


def copy_report(folder: Path, to: Path) -> Path:
    """Copy the report in a run folder to a file of the user's.

    Raises:
        UserError: it cannot be written.
    """
    content = (folder / "report" / "report.html").read_bytes()
    try:
        to.write_bytes(content)
    except OSError as error:
        raise UserError(f"--to {to}: cannot be written ({error.strerror}); name another file") from None
    return to


def report_after_failure(run: str) -> None:
    """Build the report of a run that failed, and say where it is; that it cannot be built hides no failure."""
    try:
        with report_of(run):
            print(report_line(run), flush=True)
    except TuneloopError as error:
        print(f"no report: {error}", flush=True)


def skipped(folder: Path) -> bool:
    """Whether the run ended behind data_prep, because there was nothing new to train on."""
    return _read(folder / "data_prep" / "step.json")["summary"]["changed"] is False


def exit_code(folder: Path) -> int:
    """0 when the run promoted or had nothing to train on, 3 when the gate said no."""
    if skipped(folder):
        return EXIT_OK
    passed = _read(folder / "evaluate" / "evaluation.json")["gate"]["passed"]
    return EXIT_OK if passed else EXIT_GATE_REFUSED


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
