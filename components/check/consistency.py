"""Settings of different sections that contradict each other; every refusal names both."""

from components.config import RunConfig
from tuneloop.errors import UserError
from tuneloop.evaluation.settings import COST_METRICS


def check_consistency(config: RunConfig) -> None:
    """Compare the sections with each other.

    Raises:
        UserError: two settings cannot both hold.
    """
    _check_mode(config)
    _check_lengths(config)
    _check_guards(config)
    _check_reward_kinds(config)
    _check_held_out_rows(config)


def _check_mode(config: RunConfig) -> None:
    if config.lora_rl.mode == "full":
        raise UserError(
            'lora_rl.mode = "full" trains a whole model to compare LoRA with, but merging, gate and registry are for '
            'adapters: run python -m components.lora_rl alone, or set the mode to "lora"'
        )
    if config.lora.start_from and config.sft_warmup.mode == "full":
        raise UserError('lora.start_from continues an adapter, but sft_warmup.mode = "full" trains the weights below '
                        'it: set the mode to "lora", or leave start_from out')  # fmt: skip


def _check_lengths(config: RunConfig) -> None:
    needed = config.data_prep.max_prompt_tokens + config.data_prep.max_completion_tokens
    if config.sft_warmup.updates and needed > config.model.max_length:
        raise UserError(
            f"data_prep.max_prompt_tokens + data_prep.max_completion_tokens = {needed} exceeds model.max_length = "
            f"{config.model.max_length}: SFT could not see its examples whole; lower one or raise model.max_length"
        )
    for step, settings in (("sft_warmup", config.sft_warmup), ("lora_rl", config.lora_rl)):
        if settings.micro_batch_tokens < config.model.max_length:
            raise UserError(
                f"{step}.micro_batch_tokens = {settings.micro_batch_tokens} is less than model.max_length = "
                f"{config.model.max_length}: the longest sequence fits in no batch; raise it"
            )


def _check_guards(config: RunConfig) -> None:
    known = {*(reward.name for reward in config.task.rewards), *COST_METRICS}
    for guard in config.evaluate.gate.guards:
        of_harness = config.evaluate.harness and "/" in guard.metric  # what its tasks measure is known when they ran
        if guard.metric not in known and not of_harness:
            raise UserError(
                f"evaluate.gate.guards: {guard.metric!r} is not measured; known: {', '.join(sorted(known))}"
            )


def _check_reward_kinds(config: RunConfig) -> None:
    first = config.task.rewards[0]
    for number, source in enumerate(config.data_prep.sources):
        if first.kind == "reasoning_gym" and source.kind != "reasoning_gym":
            raise UserError(
                f"task.rewards.0 is of kind reasoning_gym, which cannot judge the rows of data_prep.sources.{number} "
                f"(kind {source.kind}): put another reward first"
            )


def _check_held_out_rows(config: RunConfig) -> None:
    """With sources of known size, an upper bound on the test split is known before a row is read."""
    data = config.data_prep
    if any(source.kind != "reasoning_gym" for source in data.sources):
        return
    rows = sum(source.size for source in data.sources)
    expected = rows * data.test_share
    if expected < config.evaluate.min_prompts:
        raise UserError(
            f"data_prep: {rows} rows with test_share = {data.test_share} hold out about {expected:.0f} prompts, fewer "
            f"than evaluate.min_prompts = {config.evaluate.min_prompts}: raise a source's size or test_share"
        )
