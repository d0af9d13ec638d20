"""The report as the pipeline's exit task: it runs whatever happened before."""

from kfp import dsl

from components.images import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False, packages_to_install=[])
def report(
    output_uri: str,
    due: str,
    metrics: dsl.Output[dsl.Metrics],
    page: dsl.Output[dsl.HTML],
    model_card: dsl.Output[dsl.Markdown],
) -> str:
    """Write the run's report and model card; returns the URI of the report."""
    from components.node import report_in_pipeline

    return report_in_pipeline(output_uri, due, metrics, page.path, model_card.path)
