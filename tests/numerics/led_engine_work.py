"""What each of the two processes of test_led_engine.py does: `python -m tests.numerics.led_engine_work RANK FOLDER`."""

import json
import sys
from pathlib import Path

import torch

from tuneloop.errors import UserError
from tuneloop.models.adapter_io import load_adapter
from tuneloop.models.sources import resolve_model
from tuneloop.rollout.engine import SampleStream
from tuneloop.rollout.led_engine import LedEngine
from tuneloop.rollout.torch_engine import TorchEngine
from tuneloop.settings import SamplingSettings
from tuneloop.world import World

BASE = "tiny://qwen2?seed=3"
PROMPTS = [[40, 41, 42, 43, 44], [50], [60, 61, 62]]


def sample(engine, indices: list[int]) -> list[list[list[int]]]:
    """Token ids of three samples of the prompts with these numbers."""
    groups = engine.generate(
        [PROMPTS[index] for index in indices],
        samples=3,
        sampling=SamplingSettings(),
        max_new_tokens=6,
        stream=SampleStream(7, 1, indices),
    )
    return [[completion.token_ids for completion in group] for group in groups]


def main(rank: int, folder: Path) -> None:
    """Write what this process was given."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = TorchEngine(resolve_model(BASE), dtype="float32", device="cpu") if rank == 0 else None
    world = World()
    engine = LedEngine(own, world, 2)
    digest = engine.sync(load_adapter(folder / "adapter"))
    engine.sleep()
    engine.wake()
    given = {"digest": digest, "sampled": sample(engine, list(world.share(len(PROMPTS))))}
    given["logprobs"] = engine.logprobs([(PROMPTS[0], PROMPTS[2])])
    try:
        engine.sync(load_adapter(folder / "misfit"))
    except UserError as error:
        given["error"] = str(error)
    engine.close()
    (folder / f"{rank}.json").write_text(json.dumps(given))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
