"""The data_prep step as a pipeline component."""

from typing import NamedTuple

from kfp import dsl

from components.images import BASE_IMAGE


@dsl.component(base_image=BASE_IMAGE, install_kfp_package=False, packages_to_install=[])
def data_prep(config: str, output_uri: str, due: str, metrics: dsl.Output[dsl.Metrics]) -> NamedTuple(
    "Outputs", [("uri", str), ("Output", bool)]
):  # type: ignore[valid-type]
    """Read, clean and split the prompts; returns the URI of the prepared data, and whether there is anything to train.

    The second is called Output because kfp.local resolves a condition on an output of no other name.
    """
    import json

    from components.node import run_in_pipeline
    from tuneloop.storage import read_file

    uri = run_in_pipeline("data_prep", config=config, output_uri=output_uri, due=due, metrics=metrics)
    return (uri, json.loads(read_file(f"{uri}/step.json"))["summary"]["changed"])  # type: ignore[return-value]
