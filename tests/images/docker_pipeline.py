"""The pipeline with every step in a container of its own: `python -m tests.images.docker_pipeline CONFIG RUN_URI`.

CONFIG is the run's config as a JSON file. The containers may do nothing but write to /tmp and talk to the network; what
they share lies in the object store that AWS_ENDPOINT_URL names.
"""

import os
import sys
import tempfile
from pathlib import Path

from kfp import local

from pipelines.post_training import post_training

# Pod security "restricted", in the Docker API's words; images.podman.RESTRICTED says the same to Podman's command line.
RESTRICTED = {
    "user": "1000:1000",
    "read_only": True,
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges"],
    "tmpfs": {"/tmp": "rw,size=4g,mode=1777"},
}


def main(config: Path, run_uri: str) -> None:
    """Run the pipeline; a failing step raises."""
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "OMP_"))}
    runner = local.DockerRunner(network_mode="host", environment=passed_on, **RESTRICTED)
    os.umask(0)  # kfp makes the folders of a task's outputs here, and the container's user writes into them
    with tempfile.TemporaryDirectory() as scratch:
        root, workspace = Path(scratch) / "root", Path(scratch) / "workspace"
        for folder in (Path(scratch), root, workspace):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o777)
        local.init(runner, pipeline_root=str(root), workspace_root=str(workspace), raise_on_error=True)
        post_training(config=config.read_text(), output_uri=run_uri)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
