"""What a plan is made from: the settings that decide memory and time, and the model's dimensions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tuneloop.models.targets import choose_targets, linear_layers, match_pattern
from tuneloop.plan.shapes import ModelShape
from tuneloop.rollout.settings import EngineSettings
from tuneloop.settings import LoraSettings
from tuneloop.training.settings import RlSettings, SftSettings

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class PlanInputs:
    """A run, as far as it decides memory and time; "auto" is resolved.

    Attributes:
        dtype: that the model is held in.
        max_rank: the largest that a module of any adapter will ever have: what an engine makes room for.
        prompt_tokens, completion_tokens: the longest of RL; the plan takes all to be that long.
        example_tokens: the longest completion of the warm-up.
        max_length: longest sequence that the engine must hold.
        evaluated: completions that the evaluation decodes at once.
        evaluated_prompts, evaluation_samples: prompts of the evaluation, and sampled completions of each.
        tokenizer_bytes: of tokenizer.json; 0: unknown.
        targets: module name -> (out, in, rank) of every linear layer that gets an adapter.
    """

    shape: ModelShape
    dtype: str
    lora: LoraSettings
    max_rank: int
    sft: SftSettings
    rl: RlSettings
    prompt_tokens: int
    completion_tokens: int
    example_tokens: int
    max_length: int
    evaluated: int
    evaluated_prompts: int
    evaluation_samples: int
    evaluation_engine: EngineSettings
    targets: Mapping[str, tuple[int, int, int]]
    tokenizer_bytes: int = 0

    @property
    def width(self) -> int:
        """Bytes of one weight or activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def weight_bytes(self) -> int:
        """Of the base model."""
        return self.shape.parameters * self.width

    def with_rl(self, **changes: Any) -> "PlanInputs":
        """With other settings of `[lora_rl]`; a dotted section is written with two underscores."""
        nested: dict[str, dict[str, Any]] = {}
        plain: dict[str, Any] = {}
        for name, value in changes.items():
            section, separator, key = name.partition("__")
            if separator:
                nested.setdefault(section, {})[key] = value
            else:
                plain[name] = value
        for section, values in nested.items():
            plain[section] = getattr(self.rl, section).model_copy(update=values)
        return replace(self, rl=self.rl.model_copy(update=plain))


def adapter_targets(shape: ModelShape, lora: LoraSettings) -> dict[str, tuple[int, int, int]]:
    """Module name -> (out, in, rank) of every linear layer that gets an adapter.

    Raises:
        UserError: `[lora]` matches nothing.
    """
    linear = linear_layers(shape.tensors())
    ranks = {name: match_pattern(lora.rank_pattern, name, lora.rank) for name in choose_targets(linear, lora)}
    return {name: (*linear[name], rank) for name, rank in ranks.items()}


@dataclass(frozen=True)
class AdapterSize:
    """What an adapter adds to a model.

    Attributes:
        parameters: of all factors.
        matrices: elements of the matrices that are adapted.
        ranks: sum of the ranks of one layer's modules: columns that each token adds to the activations of a layer.
        largest: elements of the largest factor.
    """

    parameters: int
    matrices: int
    ranks: float
    largest: int


def adapter_size(inputs: PlanInputs) -> AdapterSize:
    """The size of the run's adapter."""
    targets = inputs.targets.values()
    return AdapterSize(
        parameters=sum(rank * (out + into) for out, into, rank in targets),
        matrices=sum(out * into for out, into, _ in targets),
        ranks=sum(rank for _, _, rank in targets) / inputs.shape.layers,
        largest=max(rank * max(out, into) for out, into, rank in targets),
    )


@dataclass(frozen=True)
class PackedWork:
    """The forward passes of one optimiser step, all prompts and completions being of full length.

    Attributes:
        group_tokens: packed rows of one prompt with its completions.
        groups: in one pass.
        passes: of one optimiser step, in one process.
        samples: completions a prompt.
    """

    prompt_tokens: int
    completion_tokens: int
    samples: int
    groups: int
    passes: int

    @property
    def group_tokens(self) -> int:
        """Packed rows: the prompt once, and every completion but its last token."""
        return self.prompt_tokens + self.samples * (self.completion_tokens - 1)

    @property
    def tokens(self) -> int:
        """Packed rows of one pass."""
        return self.groups * self.group_tokens

    @property
    def scored(self) -> int:
        """Tokens of one pass whose log-prob is taken."""
        return self.groups * self.samples * self.completion_tokens


def packed_work(prompt: int, completion: int, samples: int, groups: int, budget: int) -> PackedWork:
    """How groups of equal length fill passes of `budget` packed tokens; see `tuneloop.training.batching`."""
    length = prompt + samples * (completion - 1)
    at_once = max(1, min(groups, budget // length))
    return PackedWork(prompt, completion, samples, at_once, math.ceil(groups / at_once))


def rl_work(inputs: PlanInputs, processes: int) -> PackedWork:
    """Of one process in one optimiser step of RL."""
    rl = inputs.rl
    groups = math.ceil(rl.prompts_per_update / rl.algorithm.minibatches / processes)
    return packed_work(inputs.prompt_tokens, inputs.completion_tokens, rl.group_size, groups, rl.micro_batch_tokens)


def sft_work(inputs: PlanInputs) -> PackedWork:
    """Of one optimiser step of the warm-up."""
    sft = inputs.sft
    return packed_work(inputs.prompt_tokens, inputs.example_tokens, 1, sft.examples_per_update, sft.micro_batch_tokens)
