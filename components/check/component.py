"""The check step as a pipeline component: the config with the form's parameters, refused before a GPU is asked for."""

from typing import NamedTuple

from kfp import dsl

from components.images import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False, packages_to_install=[])
def check(
    config: str,
    base_model: str,
    dataset_uri: str,
    output_uri: str,
    updates: int,
    lora_rank: int,
    learning_rate: float,
    adapter_name: str,
    schedule_time: str,
    due: str,
    metrics: dsl.Output[dsl.Metrics],
) -> NamedTuple("Outputs", [("uri", str), ("config", str)]):  # type: ignore[valid-type]
    """Resolve the config, and refuse what cannot work."""
    from components.node import due_time, publish_config, run_in_pipeline

    parameters = {
        "base_model": base_model,
        "dataset_uri": dataset_uri,
        "updates": updates,
        "lora_rank": lora_rank,
        "learning_rate": learning_rate,
        "adapter_name": adapter_name,
        "schedule_time": schedule_time or due_time(due),
    }
    uri = run_in_pipeline(
        "check", config=config, output_uri=output_uri, due=due, parameters=parameters, metrics=metrics
    )
    return (uri, publish_config(uri))  # type: ignore[return-value]
