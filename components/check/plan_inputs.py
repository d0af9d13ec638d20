"""A run's config as what `tuneloop.plan` plans: the one place that reads the config for it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from components.auto import resolve_auto
from components.config import RunConfig
from tuneloop.models.recommend import ModelSize
from tuneloop.models.targets import linear_layers
from tuneloop.plan.fit import Change
from tuneloop.plan.inputs import PlanInputs, adapter_targets
from tuneloop.plan.shapes import ModelShape, find_shape


def may_change(config: RunConfig) -> Callable[[Sequence[Change]], bool]:
    """Whether the config with some settings changed is still one."""

    def allowed(changes: Sequence[Change]) -> bool:
        values = config.model_dump()
        for change in changes:
            table = values
            for name in change.table.split("."):
                table = table[name]
            table[change.key] = change.value
        try:
            RunConfig.model_validate(values)
        except ValueError:
            return False
        return True

    return allowed


def plan_inputs(config: RunConfig, shape: ModelShape | None = None, tokenizer: Path | None = None) -> PlanInputs:
    """What decides the run's memory and time, every "auto" replaced.

    Args:
        shape: of the base model; None: of the config.json that `model.uri` leads to, without fetching weights.
        tokenizer: tokenizer.json, if it is there.

    Raises:
        UserError: the model's config.json cannot be found, or `[lora]` matches nothing in it.
    """
    shape = shape or find_shape(config.model.uri)
    config = resolve_auto(config, ModelSize(shape.parameters, linear_layers(shape.tensors())))
    lora, schedule, evaluate = config.lora, config.lora_rl.rank_schedule, config.evaluate
    max_rank = schedule.largest(lora.largest_rank)
    if schedule.kind != "off":  # the budget is a mean rank, and the larger of its two ends is planned for
        lora = lora.model_copy(update={"rank": max(schedule.initial or lora.rank, schedule.final), "rank_pattern": {}})
    return PlanInputs(
        shape=shape,
        dtype=config.model.dtype,
        lora=lora,
        max_rank=max_rank,
        sft=config.sft_warmup,
        rl=config.lora_rl,
        prompt_tokens=config.data_prep.max_prompt_tokens,
        completion_tokens=config.task.max_new_tokens,
        example_tokens=config.data_prep.max_completion_tokens,
        max_length=config.model.max_length,
        evaluated=min(evaluate.max_sequences, evaluate.prompts * evaluate.samples),
        evaluated_prompts=evaluate.prompts,
        evaluation_samples=evaluate.samples,
        evaluation_engine=evaluate.engine,
        targets=adapter_targets(shape, lora),
        tokenizer_bytes=tokenizer.stat().st_size if tokenizer and tokenizer.is_file() else 0,
    )
