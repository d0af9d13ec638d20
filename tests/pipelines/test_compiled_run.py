"""A run that is started from the compiled file alone, with a data set's URI and an output URI and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

from pipelines.compile import KUBERNETES, compile_pipeline
from tests.pipelines.test_argo_run import ROWS, SETTINGS
from tests.s3_server import BUCKET, s3_server  # noqa: F401 - a fixture
from tests.tiny_run import tiny_config

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_compiled_file_with_two_uris_is_a_whole_run(s3_server, tmp_path):  # noqa: F811
    client = s3_server.client()
    client.put_object(Bucket=BUCKET, Key="rows.jsonl", Body=ROWS.encode())
    [package] = compile_pipeline(tiny_config(*SETTINGS), tmp_path, ("kubernetes",))
    assert package.name == KUBERNETES
    run = f"s3://{BUCKET}/runs/first"
    command = [sys.executable, "-m", "tests.pipelines.compiled_run", str(package),
               f"dataset_uri=s3://{BUCKET}/rows.jsonl", f"output_uri={run}"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TUNELOOP_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report = json.loads(client.get_object(Bucket=BUCKET, Key="runs/first/report.json")["Body"].read())
    assert report["status"] == "promoted"
    resolved = json.loads(client.get_object(Bucket=BUCKET, Key="runs/first/config.json")["Body"].read())
    assert resolved["data_prep"]["sources"][0]["uri"] == f"s3://{BUCKET}/rows.jsonl"
