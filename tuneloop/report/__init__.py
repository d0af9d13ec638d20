"""The report of a run: an HTML page, a model card, and the run in one small JSON file."""

from tuneloop.report.build import ReportFiles, build_report
from tuneloop.report.outcome import report_metrics
from tuneloop.report.remote import fetched_run, report_of

__all__ = ["ReportFiles", "build_report", "fetched_run", "report_metrics", "report_of"]
