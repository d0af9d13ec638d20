"""Make api.json from the API's published Swagger document: `python -m tests.cluster.kfp_api.make swagger.json`.

The document is Kubeflow Pipelines' (https://github.com/kubeflow/pipelines, backend/api/v2beta1/swagger), Apache-2.0;
descriptions and the services that nothing here calls are left out.
"""

import json
import sys
from pathlib import Path
from typing import Any

API = Path(__file__).parent / "api.json"
_SERVICES = ("PipelineService", "PipelineUploadService", "RunService", "ExperimentService", "RecurringRunService",
             "HealthzService")  # fmt: skip
_LEFT_OUT = ("description", "title", "summary", "x-exportParamName", "x-optionalDataType")


def _stripped(value: Any, named: bool = False) -> Any:
    """Without descriptions; a property may be called so, and is kept."""
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: found for key, found in value.items() if named or key not in _LEFT_OUT}
    return {key: _stripped(found, named=key in ("properties", "definitions")) for key, found in kept.items()}


def _referenced(value: Any, definitions: dict[str, Any], found: dict[str, Any]) -> None:
    if isinstance(value, list):
        for item in value:
            _referenced(item, definitions, found)
    elif isinstance(value, dict):
        name = str(value.get("$ref", "")).removeprefix("#/definitions/")
        if name and name not in found:
            found[name] = _stripped(definitions[name])
            _referenced(definitions[name], definitions, found)
        for item in value.values():
            _referenced(item, definitions, found)


def main(source: str) -> None:
    document = json.loads(Path(source).read_text())
    paths = {
        path: {verb: _stripped(operation) for verb, operation in verbs.items()}
        for path, verbs in document["paths"].items()
        if any(set(operation["tags"]) & set(_SERVICES) for operation in verbs.values())
    }
    definitions: dict[str, Any] = {}
    also = {"$ref": "#/definitions/v2beta1Filter"}  # what the parameter `filter` holds as JSON text
    _referenced([paths, also], document["definitions"], definitions)
    about = {key: document["info"][key] for key in ("title", "version", "license")}
    trimmed = {"swagger": document["swagger"], "info": about, "paths": paths, "definitions": definitions}
    API.write_text(json.dumps(trimmed, sort_keys=True, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
