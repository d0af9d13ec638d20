"""The lora_rl step as a pipeline component."""

from kfp import dsl

from components.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False, packages_to_install=[])
def lora_rl(config: str, output_uri: str, data: str, warmup: str, due: str, metrics: dsl.Output[dsl.Metrics]) -> str:
    """Train the adapter by reinforcement learning; returns the URI of the training."""
    from components.node import run_in_pipeline

    inputs = {"data": data, "warmup": warmup}
    return run_in_pipeline("lora_rl", config=config, output_uri=output_uri, due=due, inputs=inputs, metrics=metrics)
