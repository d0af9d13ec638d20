"""What the two processes of test_distributed.py compute: `python -m tests.numerics.distributed_work FOLDER`.

The same functions, called in the test's own process, give what one process computes.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from tuneloop.errors import UserError
from tuneloop.models.forward import score, score_with_hidden
from tuneloop.models.load import checkpoint_layers, load_model, reserve_model
from tuneloop.models.lora import attach, extract, trainable_parameters
from tuneloop.models.lora_linear import LoraLinear
from tuneloop.models.packed import Group, pack
from tuneloop.models.sharding import METER
from tuneloop.models.sources import resolve_model
from tuneloop.settings import LoraSettings, OptimizerSettings
from tuneloop.training.launch import take_part
from tuneloop.training.optim import MasterAdamW, Optimizer
from tuneloop.training.settings import DistributedSettings
from tuneloop.world import World

MODEL = "tiny://qwen2?seed=0"
STEPS, LATER_STEPS = 2, 2
SETTINGS = OptimizerSettings(
    learning_rate=0.01, schedule="cosine", warmup_updates=1, weight_decay=0.01, max_grad_norm=0.5
)
SPREAD = DistributedSettings(zero_stage=3, whole_below=0, bucket_elements=1000)
CASES = {  # name -> (model's dtype, settings, checkpointed layers, a head beside the model)
    "stage1-float32": ("float32", DistributedSettings(zero_stage=1), False, False),
    "stage2-float32": ("float32", DistributedSettings(zero_stage=2), False, False),
    "stage3-float32": ("float32", SPREAD, False, False),
    "stage1-bfloat16": ("bfloat16", DistributedSettings(zero_stage=1), False, False),
    "stage2-bfloat16": ("bfloat16", DistributedSettings(zero_stage=2), False, False),
    "stage3-bfloat16": ("bfloat16", SPREAD.model_copy(update={"bucket_elements": 50_000_000}), False, False),
    "offload2": ("float32", DistributedSettings(zero_stage=2, offload_optimizer=True), False, False),
    "offload3": (
        "float32", SPREAD.model_copy(update={"offload_optimizer": True, "offload_parameters": True}), False, False,
    ),
    "checkpointed3": ("float32", SPREAD, True, False),
    "partly_whole3": ("float32", SPREAD.model_copy(update={"whole_below": 300}), False, False),
    "head1": ("bfloat16", DistributedSettings(zero_stage=1), False, True),
    "head3": ("float32", SPREAD, False, True),
}  # fmt: skip


class Trained:
    """A model with an adapter, and if wanted a head on its hidden states."""

    def __init__(self, model: PreTrainedModel, *, checkpointed: bool = False, with_head: bool = False):
        self.model = model
        if checkpointed:
            checkpoint_layers(model)
        self.layers = attach(model, LoraSettings(rank=3), seed=1)  # 3: sizes that two processes cannot halve
        generator = torch.Generator().manual_seed(5)
        for layer in self.layers.values():
            layer.B.data.copy_(torch.randn(layer.B.shape, generator=generator) * 0.02)
        self.head = nn.Linear(64, 1) if with_head else None
        if self.head:
            self.head.weight.data.copy_(torch.randn(1, 64, generator=generator))
            self.head.bias.data.zero_()
        model.train()

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from trainable_parameters(self.layers)
        if self.head:
            yield from self.head.named_parameters(prefix="head")

    def train(self, optimizer: Optimizer, batches: Sequence[Sequence[Group]], steps: int) -> list[float]:
        """Norms of `steps` steps of one and the same loss over all processes' batches."""
        norms = []
        for _ in range(steps):
            for groups in batches:
                scores, hidden_TD = score_with_hidden(self.model, pack(groups))
                loss = -scores.logprobs_S.sum() / 100
                if self.head:
                    loss = loss + self.head(hidden_TD.detach().float()).square().mean() / 10
                optimizer.backward(loss)
            norms.append(optimizer.step()[0])
        return norms


def batches() -> list[list[Group]]:
    """Four batches of two groups of two completions, all lengths different."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 200, (count,), generator=generator).tolist()

    return [[(tokens(5 + n), [tokens(1 if k else 3 + n), tokens(6 + k)]) for k in range(2)] for n in range(4)]


@contextmanager
def multiplied_as_in(case: str) -> Iterator[None]:
    """Multiply layers that read the same input one by one if the case's processes do."""
    if CASES[case][1].zero_stage < 3:
        yield
        return
    with patch("tuneloop.models.lora_linear._joinable", return_value=False):
        yield


def one_process(case: str) -> tuple[Trained, MasterAdamW]:
    """What trains the case in one process."""
    dtype, _, _, with_head = CASES[case]
    trained = Trained(load_model(resolve_model(MODEL), dtype), with_head=with_head)
    return trained, MasterAdamW(trained.parameters(), SETTINGS, STEPS + LATER_STEPS)


def _several(case: str, world: World):
    from tuneloop.training.zero import ZeroAdamW

    dtype, settings, checkpointed, with_head = CASES[case]
    folder = resolve_model(MODEL)
    model = load_model(folder, dtype) if world.is_first else reserve_model(folder, dtype)
    trained = Trained(model, checkpointed=checkpointed, with_head=with_head)
    return trained, ZeroAdamW(model, trained.parameters(), SETTINGS, STEPS + LATER_STEPS, settings)


def _run_case(case: str, folder: Path, world: World) -> dict[str, float | list[float] | str]:
    mine = batches()[world.rank :: world.size]
    trained, optimizer = _several(case, world)
    facts: dict[str, float | list[float] | str] = {"norms": trained.train(optimizer, mine, STEPS)}
    _save(optimizer, folder / f"{case}.safetensors", world)
    _logprob(trained.model)
    facts["whole_elements"] = sum(p.numel() for p in trained.model.parameters())
    METER.reset()
    adapter = extract(trained.layers, {})
    facts |= {"layered_peak": METER.peak, "digest": adapter.digest(), "logprob": _logprob(trained.model)}
    METER.reset()
    assert extract(trained.layers, {}, layered=False).digest() == adapter.digest()
    facts["whole_peak"] = METER.peak
    facts["resumed_to_the_bit"] = _resumes_to_the_bit(trained, optimizer, mine, folder / f"{case}.safetensors")
    facts["refused"] = _refused(trained, optimizer, mine)
    _save(optimizer, folder / f"{case}.refused.safetensors", world)
    optimizer.load_state(load_file(folder / f"{case}.one.safetensors"))
    facts["later_norms"] = trained.train(optimizer, mine, LATER_STEPS)
    _save(optimizer, folder / f"{case}.later.safetensors", world)
    optimizer.release()
    return facts


def _resumes_to_the_bit(trained: Trained, optimizer: Optimizer, mine: Sequence[Sequence[Group]], path: Path) -> float:
    """Whether going on from the saved state, twice, ends at equal states; 1.0 in the processes that hold none."""
    ends = []
    for load in (False, True, True):
        if load:
            torch.distributed.barrier()  # the first process has written it
            optimizer.load_state(load_file(path))
        trained.train(optimizer, mine, LATER_STEPS)
        ends.append(optimizer.state())
    optimizer.load_state(load_file(path))
    return float(all(torch.equal(end[name], ends[0][name]) for end in ends for name in ends[0]))


def _logprob(model: PreTrainedModel) -> float:
    with torch.no_grad():
        return float(score(model, pack(batches()[0])).logprobs_S.sum())


def _refused(trained: Trained, optimizer: Optimizer, mine: Sequence[Sequence[Group]]) -> str:
    """The message about a gradient that is not finite, in the second process alone."""
    for number, groups in enumerate(mine):
        factor = float("nan") if torch.distributed.get_rank() == 1 and number == 0 else 1.0
        optimizer.backward(factor * score(trained.model, pack(groups)).logprobs_S.sum())
    try:
        optimizer.step()
    except UserError as error:
        return str(error)
    return ""


def _save(optimizer: Optimizer, path: Path, world: World) -> None:
    state = optimizer.state()
    assert bool(state) == world.is_first
    if state:
        save_file(state, path)


def peaks_of_modules(layers: dict[str, LoraLinear]) -> list[int]:
    """Bytes of each module's factors."""
    return [(layer.A.numel() + layer.B.numel()) * layer.A.element_size() for layer in layers.values()]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)

    def work() -> dict:
        world = World()
        return {case: _run_case(case, folder, world) for case in CASES}

    sys.exit(take_part(DistributedSettings(timeout_seconds=60), work))
