"""What a run on Kubeflow Pipelines needs before it: the pipeline, its version by its content, the experiment."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.api_calls import TIMEOUT_SECONDS
from components.config import RunConfig
from pipelines.cluster.connection import KfpConnection
from pipelines.cluster.undo import Undo
from pipelines.kfp_rendering import kubernetes_package, package_digest
from pipelines.placement import object_name

EXPERIMENT = "tuneloop"
_PAGE = 100


@dataclass(frozen=True)
class KfpPipeline:
    """A version of a pipeline on the server, and the experiment that its runs belong to."""

    pipeline_id: str
    version_id: str
    experiment_id: str

    @property
    def reference(self) -> dict[str, str]:
        """As a run names it."""
        return {"pipeline_id": self.pipeline_id, "pipeline_version_id": self.version_id}


def ensure_pipeline(api: KfpConnection, config: RunConfig, undo: Undo) -> KfpPipeline:
    """Have the server know the pipeline of a config, in this very version; what is made here, `undo` takes back.

    Raises:
        UserError: the server refuses.
        TryAgain: it is away.
    """
    package = kubernetes_package(config)
    pipeline_id = _pipeline(api, object_name(config), undo)
    version_id = _version(api, pipeline_id, version_name(config, package), package, undo)
    return KfpPipeline(pipeline_id, version_id, _experiment(api, undo))


def version_name(config: RunConfig, package: str) -> str:
    """Of the version that holds a compiled package: equal content, equal name."""
    return f"{object_name(config)}-{package_digest(package)[:10]}"


def _pipeline(api: KfpConnection, name: str, undo: Undo) -> str:
    description = "A LoRA adapter proven better than the one in production."
    body = {"name": name, "display_name": name, "description": description, **in_namespace(api)}
    pipeline, _ = undo.ensure(
        f"pipeline {name}",
        lambda: api.server.absent_as_none(
            lambda: api.client.pipelines.pipeline_service_get_pipeline_by_name(
                name, **in_namespace(api), _request_timeout=TIMEOUT_SECONDS
            )
        ),
        lambda: api.client.pipelines.pipeline_service_create_pipeline(body, _request_timeout=TIMEOUT_SECONDS),
        lambda found: api.client.pipelines.pipeline_service_delete_pipeline(
            found.pipeline_id, _request_timeout=TIMEOUT_SECONDS
        ),
    )
    return pipeline.pipeline_id


def _version(api: KfpConnection, pipeline_id: str, name: str, package: str, undo: Undo) -> str:
    def find() -> Any:
        answer = api.client.pipelines.pipeline_service_list_pipeline_versions(
            pipeline_id, filter=equals("display_name", name), page_size=_PAGE, _request_timeout=TIMEOUT_SECONDS
        )
        return next(iter(answer.pipeline_versions or []), None)

    with tempfile.TemporaryDirectory(prefix="tuneloop-") as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text(package, encoding="utf-8")
        version, made = undo.ensure(
            f"pipeline version {name}",
            find,
            lambda: api.client.pipeline_uploads.upload_pipeline_version(
                str(file), name=name, display_name=name, pipelineid=pipeline_id, _request_timeout=TIMEOUT_SECONDS
            ),
            lambda found: api.client.pipelines.pipeline_service_delete_pipeline_version(
                pipeline_id, found.pipeline_version_id, _request_timeout=TIMEOUT_SECONDS
            ),
        )
    print(f"pipeline: {name}, {'uploaded' if made else 'as it is there already'}", flush=True)
    return version.pipeline_version_id


def _experiment(api: KfpConnection, undo: Undo) -> str:
    body = {"display_name": EXPERIMENT, **in_namespace(api)}

    def find() -> Any:
        answer = api.client.experiments.experiment_service_list_experiments(
            **in_namespace(api), filter=equals("display_name", EXPERIMENT), _request_timeout=TIMEOUT_SECONDS
        )
        return next(iter(answer.experiments or []), None)

    found, _ = undo.ensure(
        f"experiment {EXPERIMENT}",
        find,
        lambda: api.client.experiments.experiment_service_create_experiment(body, _request_timeout=TIMEOUT_SECONDS),
        lambda found: api.client.experiments.experiment_service_delete_experiment(
            found.experiment_id, _request_timeout=TIMEOUT_SECONDS
        ),
    )
    return found.experiment_id


def in_namespace(api: KfpConnection) -> dict[str, str]:
    """The argument that names the namespace, which single-user mode refuses."""
    return {"namespace": api.namespace} if api.namespace else {}


def equals(key: str, value: str) -> str:
    """A filter as the API's v2beta1Filter."""
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": key, "string_value": value}]})
