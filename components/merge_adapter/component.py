"""The merge_adapter step as a pipeline component."""

from kfp import dsl

from components.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False, packages_to_install=[])
def merge_adapter(
    config: str, output_uri: str, training: str, data: str, warmup: str, due: str, metrics: dsl.Output[dsl.Metrics]
) -> str:
    """Fold the adapter into its base and probe the result; returns the URI of the merged model."""
    from components.node import run_in_pipeline

    inputs = {"training": training, "data": data, "warmup": warmup}
    return run_in_pipeline(
        "merge_adapter", config=config, output_uri=output_uri, due=due, inputs=inputs, metrics=metrics
    )
