"""The sft_warmup step as a pipeline component."""

from kfp import dsl

from components.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False, packages_to_install=[])
def sft_warmup(config: str, output_uri: str, data: str, due: str, metrics: dsl.Output[dsl.Metrics]) -> str:
    """Warm the adapter up on completions; returns the URI of the warm-up."""
    from components.node import run_in_pipeline

    return run_in_pipeline(
        "sft_warmup", config=config, output_uri=output_uri, due=due, inputs={"data": data}, metrics=metrics
    )
