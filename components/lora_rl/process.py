"""One of the processes that run lora_rl together; started by `tuneloop.training.launch`, or by torchrun.

`python -m components.lora_rl.process REQUEST`, with REQUEST a JSON file: `{"config", "inputs", "output"}`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from components.config import RunConfig
from components.exit_codes import stop_on_signals
from components.lora_rl.step import train
from tuneloop.config import parse_config
from tuneloop.training.launch import take_part


def main(request: Path) -> int:
    """Do this process's part; returns the exit code."""
    wanted: dict[str, Any] = json.loads(request.read_text())
    config = parse_config(RunConfig, wanted["config"], origin=str(request))
    inputs = {name: Path(path) for name, path in wanted["inputs"].items()}

    def work() -> dict[str, Any]:
        with stop_on_signals():
            return train(config, inputs, Path(wanted["output"]))

    return take_part(config.lora_rl.distributed, work)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
