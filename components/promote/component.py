"""The promote step as a pipeline component."""

from kfp import dsl

from components.images import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False, packages_to_install=[])
def promote(
    config: str,
    output_uri: str,
    training: str,
    evaluation: str,
    data: str,
    merge: str,
    due: str,
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Register the adapter as a new version and move the alias to it; returns the URI of the promotion."""
    from components.node import run_in_pipeline

    inputs = {"training": training, "evaluation": evaluation, "data": data, "merge": merge}
    return run_in_pipeline("promote", config=config, output_uri=output_uri, due=due, inputs=inputs, metrics=metrics)
