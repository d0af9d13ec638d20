"""The evaluate step as a pipeline component."""

from typing import NamedTuple

from kfp import dsl

from components.images import TRAIN_IMAGE


@dsl.component(base_image=TRAIN_IMAGE, install_kfp_package=False, packages_to_install=[])
def evaluate(
    config: str, output_uri: str, data: str, warmup: str, training: str, due: str, metrics: dsl.Output[dsl.Metrics]
) -> NamedTuple("Outputs", [("uri", str), ("Output", bool)]):  # type: ignore[valid-type]
    """Compare base, warm-up, candidate and incumbent on held-out prompts; returns the URI and the gate's verdict.

    The verdict is called Output because kfp.local resolves a condition on an output of no other name.
    """
    import json

    from components.node import run_in_pipeline
    from tuneloop.storage import read_file

    inputs = {"data": data, "warmup": warmup, "training": training}
    uri = run_in_pipeline("evaluate", config=config, output_uri=output_uri, due=due, inputs=inputs, metrics=metrics)
    evaluation = json.loads(read_file(f"{uri}/evaluation.json"))
    return (uri, evaluation["gate"]["passed"])  # type: ignore[return-value]
