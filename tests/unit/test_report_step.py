"""`python -m components.report`, as a pod runs it."""

import json
import subprocess
import sys

import yaml

from components.report.step import main
from tests.report_run import REPOSITORY, fail_in, make_run


def test_step_writes_the_report_of_a_failed_run_and_may_be_repeated(tmp_path):
    run = fail_in(make_run(tmp_path / "run"), "lora_rl", "lost the node", 1, lines=5)
    command = [sys.executable, "-m", "components.report", "--run", run.as_uri()]
    for _ in range(2):
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"report: {run / 'report' / 'report.html'}\n"
    assert json.loads((run / "report.json").read_text())["error"] == "lost the node"


def test_step_refuses_a_missing_folder_in_one_line(tmp_path, capsys):
    assert main(["--run", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'nowhere'}: no such run folder; name the folder that holds check/, data_prep/, …\n"
    )


def test_step_passes_the_error_on(tmp_path):
    (tmp_path / "run").mkdir()
    assert main(["--run", str(tmp_path / "run"), "--error", "no GPU was to be had"]) == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["error"] == "no GPU was to be had"


def test_report_imports_no_torch():
    code = "import sys, components.report.step, tuneloop.report; print({'torch', 'kfp'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr


def test_metadata_names_what_the_step_reads_and_writes():
    metadata = yaml.safe_load((REPOSITORY / "components" / "report" / "metadata.yaml").read_text())
    assert metadata["name"] == "report"
    assert [one["name"] for one in metadata["inputs"]] == ["run"]
