"""Builds the report of a run folder: one HTML page, a model card, and `report.json`."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from tuneloop.errors import UserError
from tuneloop.report.model_card import model_card
from tuneloop.report.outcome import outcome
from tuneloop.report.page import page
from tuneloop.report.run_record import read_run


@dataclass(frozen=True)
class ReportFiles:
    """Where the report lies."""

    html: Path
    model_card: Path
    summary: Path


def build_report(run_folder: Path, error: str = "") -> ReportFiles:
    """Write `report/report.html`, `report/model_card.md` and `report.json` into a run folder.

    Any part of the run may be missing. Each file appears whole or not at all, and replaces an earlier one.

    Args:
        run_folder: `<output>/<run>`, finished, failed or stopped.
        error: why the run ended, when the caller knows more than the folder does.

    Raises:
        UserError: there is no such folder, or it cannot be written to.
    """
    run = read_run(run_folder, error)
    folder = run.folder / "report"
    files = ReportFiles(folder / "report.html", folder / "model_card.md", run.folder / "report.json")
    contents = {
        files.html: page(run),
        files.model_card: model_card(run),
        files.summary: json.dumps(outcome(run), indent=2, allow_nan=False) + "\n",
    }
    try:
        folder.mkdir(exist_ok=True)
        for path, content in contents.items():
            _write(path, content)
    except OSError as problem:
        raise UserError(
            f"{folder}: the report cannot be written ({problem.strerror}); free space, or mend the folder's rights"
        ) from None
    return files


def _write(path: Path, content: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
