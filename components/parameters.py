"""The pipeline's parameters: the few settings that people change in a console's form, on top of the config."""

import json
from collections.abc import Mapping
from typing import Any

from components.config import RunConfig
from components.tick import resolve_tick
from tuneloop.config import apply_overrides, parse_config
from tuneloop.errors import UserError

SETTINGS = {
    "base_model": "model.uri",
    "updates": "lora_rl.updates",
    "lora_rank": "lora.rank",
    "learning_rate": "lora_rl.optimizer.learning_rate",
    "adapter_name": "promote.adapter_name",
}  # parameter -> the setting that it overrides; dataset_uri is the first source's
PARAMETERS = {
    "base_model": str,
    "dataset_uri": str,
    "updates": int,
    "lora_rank": int,
    "learning_rate": float,
    "adapter_name": str,
    "schedule_time": str,
}


def resolve_parameters(config: str, parameters: Mapping[str, Any]) -> RunConfig:
    """The run's config with the given parameters set; an empty string or 0 means "as in the config".

    Args:
        config: the run's config as JSON.
        parameters: names from `PARAMETERS`; with `schedule_time`, even an empty one, the tick is resolved too.

    Raises:
        UserError: not JSON, a value is refused, or the first source reads no URI.
    """
    try:
        data = json.loads(config)
    except json.JSONDecodeError as error:
        raise UserError(f"config: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"config: expected a JSON object of settings, found {type(data).__name__}")
    given = {name: value for name, value in parameters.items() if value and name != "schedule_time"}
    dataset_uri = given.pop("dataset_uri", "")
    data = apply_overrides(
        data, [f"{SETTINGS[name]}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items()]
    )
    resolved = parse_config(RunConfig, data, origin="config")
    if dataset_uri:
        resolved = _with_dataset(data, resolved, dataset_uri)
    if "schedule_time" not in parameters:
        return resolved
    return resolve_tick(resolved, parameters["schedule_time"])


def _with_dataset(data: dict[str, Any], resolved: RunConfig, dataset_uri: str) -> RunConfig:
    if not resolved.data_prep.sources[0].uri:
        kind = resolved.data_prep.sources[0].kind
        raise UserError(
            f"dataset_uri {dataset_uri}: the first source is of kind {kind} and reads no URI; change config"
        )
    data["data_prep"]["sources"][0]["uri"] = dataset_uri
    return parse_config(RunConfig, data, origin="config")
