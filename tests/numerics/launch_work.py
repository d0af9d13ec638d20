"""What the processes of test_distributed_launch.py do: `python -m tests.numerics.launch_work HOW`."""

import os
import signal
import sys
import time

import torch

from components.exit_codes import stop_on_signals
from tuneloop.errors import TryAgain, UserError
from tuneloop.training.launch import take_part
from tuneloop.training.settings import DistributedSettings
from tuneloop.training.stopping import StopRequest
from tuneloop.world import World


def work(how: str) -> dict:
    world = World()
    print(f"a line of process {world.rank}", flush=True)
    if how == "mistake" and world.rank == 1:
        raise UserError("something\nto change")
    if how == "bug" and world.rank == 1:
        raise ValueError("a bug of process 1")
    if how == "killed" and world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs" and world.rank == 1:
        time.sleep(600)
    if how == "deaf":  # the second process has not come to install its handlers
        world.any(False)
        if world.rank == 1:
            time.sleep(600)
        print("waiting", flush=True)
        world.any(False)
    if how == "stopped":
        with stop_on_signals(), StopRequest() as stop:
            world.any(False)  # both listen
            print("waiting", flush=True)
            while not world.any(stop.requested):
                time.sleep(0.05)
            raise TryAgain("stopped after update 7")
    ranks = world.gather(world.rank)
    return {"ranks": ranks, "threads": torch.get_num_threads(), "shares": list(world.share(5))}


if __name__ == "__main__":
    timeout = 3 if sys.argv[1] == "hangs" else 60
    sys.exit(take_part(DistributedSettings(timeout_seconds=timeout), lambda: work(sys.argv[1])))
