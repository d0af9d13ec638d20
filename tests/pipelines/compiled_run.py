"""Runs a compiled package as a backend does: from the file alone, with no more than a console's form asks for.

`python -m tests.pipelines.compiled_run PACKAGE NAME=VALUE…`; in a process of its own, because kfp.local is set up once.
kfp.local stands in for the backend; the one placeholder of ours that it does not know is filled in as backends do it.
"""

import sys
import tempfile
from pathlib import Path

from kfp import components, dsl, local

DUE = "2026-01-09T13:00:00Z"


def main() -> None:
    """Run the package with the parameters given."""
    package, *given = sys.argv[1:]
    text = Path(package).read_text().replace(dsl.PIPELINE_JOB_SCHEDULE_TIME_UTC_PLACEHOLDER, DUE)
    pipeline = components.load_component_from_text(text)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        local.init(
            local.SubprocessRunner(use_venv=False),
            pipeline_root=f"{scratch}/root",
            workspace_root=f"{scratch}/workspace",
            raise_on_error=True,
        )
        pipeline(**dict(text.split("=", 1) for text in given))


if __name__ == "__main__":
    main()
