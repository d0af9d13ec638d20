"""The DAG: check, data, warm-up, reinforcement learning, merge, evaluation, promotion; a report whatever happens.

This is the one definition; the laptop's runner, the compiled YAML and the clusters all use it.
"""

from collections.abc import Callable
from typing import Any

from kfp import dsl

from components.check.component import check
from components.data_prep.component import data_prep
from components.evaluate.component import evaluate
from components.lora_rl.component import lora_rl
from components.merge_adapter.component import merge_adapter
from components.promote.component import promote
from components.report.component import report
from components.sft_warmup.component import sft_warmup

Place = Callable[[str, dsl.PipelineTask], object]


def without_cache(component: Any, due: str = "", **arguments: Any) -> dsl.PipelineTask:
    """A task without the backend's cache, which looks neither at our code nor behind a URI; steps have their own.

    Each is told when the run was due, because the run folder of a schedule's tick is named after it.
    """
    return component(**arguments, due=due).set_caching_options(False)


def build_pipeline(place: Place = lambda step, task: None, config_json: str = "", due: str = "") -> Callable[..., Any]:
    """The pipeline, its steps placed, its parameter `config` with a default.

    Args:
        place: is called with the name and the task of every step.
        config_json: the config that a run has to which none is given.
        due: the backend's placeholder for when a run was due; kfp.local has none.
    """

    def placed(component: Any, **arguments: Any) -> dsl.PipelineTask:
        task = without_cache(component, due, **arguments)
        place(task.name.replace("-", "_"), task)
        return task

    @dsl.pipeline(name="tuneloop-post-training", description="A LoRA adapter proven better than the one in production.")
    def post_training(
        config: str = config_json,
        output_uri: str = "",
        base_model: str = "",
        dataset_uri: str = "",
        updates: int = 0,
        lora_rank: int = 0,
        learning_rate: float = 0.0,
        adapter_name: str = "",
        schedule_time: str = "",
    ):
        """Train an adapter, prove it, promote it.

        Args:
            config: the run's config as JSON.
            output_uri: the run folder; has to be given.
            base_model: model.uri; as in the config when empty, like every parameter below at its default.
            dataset_uri: the first data source's uri.
            updates: lora_rl.updates.
            lora_rank: lora.rank.
            learning_rate: lora_rl.optimizer.learning_rate.
            adapter_name: promote.adapter_name.
            schedule_time: when the tick of a schedule was due, ISO 8601; now when empty.
        """
        with dsl.ExitHandler(exit_task=placed(report, output_uri=output_uri), name="post-training"):
            checked = placed(
                check,
                config=config,
                base_model=base_model,
                dataset_uri=dataset_uri,
                output_uri=output_uri,
                updates=updates,
                lora_rank=lora_rank,
                learning_rate=learning_rate,
                adapter_name=adapter_name,
                schedule_time=schedule_time,
            )
            run = {"config": checked.outputs["config"], "output_uri": output_uri}
            prepared = placed(data_prep, **run)
            with dsl.If(prepared.outputs["Output"] == True, name="data-changed"):  # noqa: E712 - builds a condition
                data = prepared.outputs["uri"]
                warmup = placed(sft_warmup, data=data, **run).outputs["Output"]
                training = placed(lora_rl, data=data, warmup=warmup, **run).outputs["Output"]
                merging = placed(merge_adapter, training=training, data=data, warmup=warmup, **run)
                evaluation = placed(evaluate, data=data, warmup=warmup, training=training, **run).after(merging)
                with dsl.If(evaluation.outputs["Output"] == True, name="gate-passed"):  # noqa: E712
                    evidence = {
                        "evaluation": evaluation.outputs["uri"],
                        "data": data,
                        "merge": merging.outputs["Output"],
                    }
                    placed(promote, training=training, **evidence, **run)

    return post_training


post_training = build_pipeline()
