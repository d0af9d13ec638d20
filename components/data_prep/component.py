"""The data_prep step as a pipeline component."""

from kfp import dsl

from components.images import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False, packages_to_install=[])
def data_prep(config: str, output_uri: str, metrics: dsl.Output[dsl.Metrics]) -> str:
    """Read, clean and split the prompts; returns the URI of the prepared data."""
    from components.node import run_in_pipeline

    return run_in_pipeline("data_prep", config=config, output_uri=output_uri, metrics=metrics)
