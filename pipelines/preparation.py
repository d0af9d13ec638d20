"""The DAG as far as the warm-up, for runs that are then trained together; its steps are those of `post_training`."""

from kfp import dsl

from components.check.component import check
from components.data_prep.component import data_prep
from components.sft_warmup.component import sft_warmup
from pipelines.post_training import without_cache


@dsl.pipeline(name="tuneloop-preparation", description="What training starts from: data and a warmed-up adapter.")
def preparation(config: str, output_uri: str):
    """Check the config, prepare data, warm up.

    Args:
        config: the run's config as JSON.
        output_uri: the run folder.
    """
    as_in_config = {"base_model": "", "dataset_uri": "", "updates": 0, "lora_rank": 0, "learning_rate": 0.0}
    checked = without_cache(
        check, config=config, output_uri=output_uri, adapter_name="", schedule_time="", **as_in_config
    )
    run = {"config": checked.outputs["config"], "output_uri": output_uri}
    data = without_cache(data_prep, **run).outputs["uri"]
    without_cache(sft_warmup, data=data, **run)
