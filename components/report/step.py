"""The report step: unlike the others it runs after a failure too, and replaces what it wrote before."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from components.command_line import CommandLine, first_paragraph
from components.exit_codes import exit_code_of
from components.node import run_folder
from tuneloop.storage import is_remote, join_uri


def run(run_uri: str, error: str = "", copy: Path | None = None) -> None:
    """Write the report of a run, as far as the run got.

    Args:
        run_uri: holds the folders of the steps.
        error: why the run ended, when nothing in the folder tells.
        copy: a file that gets the page too.

    Raises:
        UserError: there is no such folder, or none is named.
    """
    from tuneloop.report import report_of

    with report_of(run_folder(run_uri, due=""), error) as folder:
        page = folder / "report" / "report.html"
        if copy:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(page, copy)
        print(f"report: {join_uri(run_uri, 'report/report.html') if is_remote(run_uri) else page}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `python -m components.report`; returns the exit code."""
    parser = CommandLine(prog="python -m components.report", description=first_paragraph(run))
    parser.add_argument("--run", required=True, metavar="URI", help="the run folder")
    parser.add_argument("--error", default="", metavar="TEXT", help="why the run ended, when nothing in it tells")
    parser.add_argument("--page", type=Path, metavar="FILE", help="also copy the page to this file")
    arguments = parser.parse_args(argv)
    return exit_code_of(lambda: run(arguments.run, arguments.error, arguments.page))
