"""One node of several that run lora_rl together: `python -m components.lora_rl.node REQUEST`, on each of them.

REQUEST is JSON: `{"config", "inputs", "output"}`, with URIs of an object store. torchrun's variables (`PET_NNODES`,
`PET_NODE_RANK`, `PET_MASTER_ADDR`, `PET_MASTER_PORT`) say which node this is. The first node is the step: it continues
from the checkpoint in the store, sends new ones, and publishes the output. The others keep nothing.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from components.config import RunConfig
from components.exit_codes import exit_code_of
from components.lora_rl.step import STEP, run
from components.places import Input, open_place
from components.runner import execute, fingerprint_from
from tuneloop.config import parse_config
from tuneloop.training.nodes import Nodes

# Where Kubernetes reads a container's last words: https://kubernetes.io/docs/tasks/debug/debug-application/
TERMINATION_LOG = Path("/dev/termination-log")


def main(request: str) -> int:
    """Do this node's part; returns the exit code."""

    def work() -> None:
        wanted = json.loads(request)
        config = parse_config(RunConfig, wanted["config"], origin="the request")
        if Nodes.from_environment().rank == 0:
            execute(replace(STEP, maker=None), config, wanted["inputs"], wanted["output"])
        else:
            help_out(config, wanted["inputs"], wanted["output"])

    return exit_code_of(work, _leave_last_words)


def help_out(config: RunConfig, inputs: Mapping[str, str], output: str) -> None:
    """Train with the first node, unless what it is to make is there.

    Raises:
        UserError: an input is missing.
        TryAgain: told to stop, or an object store is unavailable.
    """
    given = {name: Input(f"--{name}", inputs[name], STEP.name) for name in STEP.inputs}
    upstream = {name: found for name, source in given.items() if (found := source.fingerprint())}
    done = open_place(output).finished()
    if done and done.fingerprint == fingerprint_from(STEP, config, upstream):
        return
    paths = {name: source.fetch() for name, source in given.items()}
    with tempfile.TemporaryDirectory(prefix="tuneloop-") as folder:
        run(config, paths, Path(folder))


def _leave_last_words(exit_code: int, message: str) -> None:
    with contextlib.suppress(OSError):
        if TERMINATION_LOG.exists():
            TERMINATION_LOG.write_text(f"{message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m components.lora_rl.node", description="One node of those that train together."
    )
    parser.add_argument("request", metavar="REQUEST", help="JSON, written by the step that made the TrainJob")
    return parser


if __name__ == "__main__":
    sys.exit(main(_parser().parse_args().request))
