"""The report of a run: an HTML page, a model card, and the run in one small JSON file."""

from tuneloop.report.build import ReportFiles, build_report
from tuneloop.report.outcome import report_metrics

__all__ = ["ReportFiles", "build_report", "report_metrics"]
