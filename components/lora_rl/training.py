"""What a training is put together from: a base, which several members may share, and a trainer for each member."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from components.config import RunConfig
from components.lora_rl.warmup import WarmUp, read_warmup
from tuneloop.data.chat import render_completion, render_prompt, require_chat_template
from tuneloop.data.reader import read_examples
from tuneloop.data.schema import Example
from tuneloop.memory import keep_freed_memory
from tuneloop.models.load import checkpoint_layers, load_model, load_tokenizer, reserve_model
from tuneloop.models.sources import resolve_model
from tuneloop.rewards.base import Scorer, build_scorer
from tuneloop.rollout.build import build_engine
from tuneloop.rollout.engine import DEFAULT_ADAPTER, RolloutEngine
from tuneloop.rollout.shared_weights import SharedWeights
from tuneloop.rollout.weight_sync import Canary, WeightSync
from tuneloop.training.rl import RlTask, RlTrainer
from tuneloop.training.settings import RlSettings
from tuneloop.training.stopping import StopRequest
from tuneloop.world import World

# Nats a token between two right computations: bfloat16 gives about 0.04, float32 about 1e-6.
CANARY_TOLERANCES = {"bfloat16": 0.1, "float32": 1e-3}
FEWEST_CANARIES, MOST_CANARIES = 4, 32  # fixed prompts whose tokens trainer and engine must agree on after every sync
CANARY_TOKENS = 64  # of fewer the mean gap may exceed the tolerance by chance


@dataclass(frozen=True)
class Member:
    """One run's part in a training: what it starts from, and its task.

    Attributes:
        config: the run's, as the warm-up resolved it.
        folder: of the model that is trained on.
        output: the folder to fill.
    """

    config: RunConfig
    warmup: WarmUp
    folder: Path
    scorer: Scorer
    train: Sequence[Example]
    validation: Sequence[Example]
    output: Path

    @property
    def settings(self) -> RlSettings:
        """`[lora_rl]`."""
        return self.config.lora_rl

    @property
    def base_uri(self) -> str:
        """The model that the adapter is for, as its config names it."""
        return str(self.folder.resolve()) if self.warmup.model else self.config.model.uri


def read_member(config: RunConfig, inputs: Mapping[str, Path], output: Path) -> Member:
    """Everything but the model.

    Raises:
        UserError: an input is damaged, or was made for another base or other settings.
        TryAgain: the model's store cannot be reached.
    """
    warmup = read_warmup(config, inputs["warmup"])
    return Member(
        config=warmup.config,
        warmup=warmup,
        folder=warmup.model or resolve_model(config.model.uri),
        scorer=build_scorer(config.task.rewards),
        train=read_examples(inputs["data"] / "train.parquet"),
        validation=read_examples(inputs["data"] / "validation.parquet", config.lora_rl.validation_prompts),
        output=output,
    )


@dataclass(frozen=True)
class Base:
    """What the members of a training share."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    engine: RolloutEngine
    world: World


def load_base(members: Sequence[Member]) -> Base:
    """The model and the rollout engine, for members that agree on both."""
    first, world = members[0], World()
    settings, dtype = first.settings, first.config.model.dtype
    tokenizer = load_tokenizer(first.folder)
    require_chat_template(tokenizer)
    keep_freed_memory()
    is_spread = world.together and settings.distributed.zero_stage == 3
    if is_spread and not world.is_first:  # the first process gives the others their share, a parameter at a time
        model = reserve_model(first.folder, dtype)
    else:
        model = load_model(first.folder, dtype, "cpu" if is_spread else None)
    if any(member.settings.gradient_checkpointing for member in members):
        checkpoint_layers(model)
    engine = build_engine(
        settings.engine,
        model,
        tokenizer,
        base_folder=first.folder,
        dtype=dtype,
        max_length=max(member.config.model.max_length for member in members),
        max_rank=max(m.settings.rank_schedule.largest(m.config.lora.largest_rank) for m in members),
        sampling=settings.sampling,
        log=first.output / "engine.log",
        max_adapters=len(members),
        adapted={name for member in members for name in member.warmup.adapter.factors},
        world=world,
        shares_weights=not is_spread,
    )
    return Base(model, tokenizer, engine, world)


def enough_canaries(candidates: Iterable[Canary]) -> list[Canary]:
    """The first ones: `FEWEST_CANARIES`, and on until their completions have `CANARY_TOKENS`, up to `MOST_CANARIES`."""
    chosen: list[Canary] = []
    for canary in islice(candidates, MOST_CANARIES):
        chosen.append(canary)
        if len(chosen) >= FEWEST_CANARIES and sum(len(one.completion) for one in chosen) >= CANARY_TOKENS:
            break
    return chosen


def make_trainer(
    member: Member, base: Base, name: str = DEFAULT_ADAPTER, stopping: StopRequest | None = None
) -> RlTrainer:
    """The member's trainer; its adapter is in the model then, in a model that had none.

    Args:
        name: of the member's adapter in the engine.
        stopping: of those that train together; None: one of its own.
    """
    settings, tokenizer = member.settings, base.tokenizer
    policy = member.warmup.policy(base.model)
    canaries = enough_canaries(
        Canary(render_prompt(tokenizer, example.messages), render_completion(tokenizer, example.completion))
        for example in member.validation
    )
    tolerance = settings.engine.canary_tolerance or CANARY_TOLERANCES[member.config.model.dtype]
    sync: WeightSync
    if settings.mode == "full":
        sync = SharedWeights(base.engine, base.model, canaries, tolerance)
    else:
        sync = WeightSync(
            base.engine,
            base.model,
            policy.layers,
            policy.adapter_config,
            canaries,
            tolerance,
            name,
            layered=settings.distributed.layered_summon,
        )
    task = RlTask(tokenizer, member.scorer, member.train, member.validation, member.config.task.max_new_tokens)
    seed, folder = member.config.seed, member.output
    return RlTrainer(policy, sync, task, settings, seed=seed, folder=folder, stopping=stopping)
