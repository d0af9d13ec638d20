"""Strict validation of Kubernetes objects: a field that the API does not know is an error.

Kubernetes' own kinds are compared with the schemas of the package kubernetes-validate, custom resources with what their
CustomResourceDefinitions say (`tests/cluster/crds/`). Rules that only an API server evaluates (CEL) are not checked.
A KServe predictor is a pod with the further fields that KServe 0.21's V1beta1ComponentExtensionSpec has.
"""

import functools
import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from kubernetes_validate import utils

KUBERNETES_VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")

KSERVE = ("serving.kserve.io/v1beta1", "InferenceService")
_KSERVE_FIELDS = {
    "annotations", "autoScaling", "batcher", "canaryTrafficPercent", "containerConcurrency", "deploymentStrategy",
    "labels", "logger", "maxReplicas", "minReplicas", "scaleMetric", "scaleMetricType", "scaleTarget", "timeout",
}  # fmt: skip

# Each call reads megabytes of definitions anew.
utils.schema_contents = functools.cache(utils.schema_contents)


@functools.cache
def custom_resources() -> dict[tuple[str, str], dict[str, Any]]:
    """(apiVersion, kind) -> its definition: "schema" and "scope"."""
    found = {}
    for path in sorted((Path(__file__).parent / "crds").glob("*.json.gz")):
        definition = json.loads(gzip.decompress(path.read_bytes()))
        found[f"{definition['group']}/{definition['version']}", definition["kind"]] = definition
    return found


def problems(manifest: dict[str, Any], kubernetes_version: str) -> list[str]:
    """What is wrong with an object, a line each; empty when the API would take it."""
    key = (manifest.get("apiVersion", ""), manifest.get("kind", ""))
    metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]}
    if key in custom_resources():
        return [*_own_kind(metadata, kubernetes_version), *_custom(manifest, key)]
    if key == KSERVE:
        [(part, predictor)] = manifest["spec"].items()
        pod = {name: value for name, value in predictor.items() if name not in _KSERVE_FIELDS}
        unknown = [f"spec.{part}"] if part != "predictor" else []
        return [*unknown, *_own_kind({**metadata, "kind": "Pod", "spec": pod}, kubernetes_version)]
    return _own_kind(manifest, kubernetes_version)


def _own_kind(manifest: dict[str, Any], version: str) -> list[str]:
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error.json_path}: {error.message[:300]}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [error.message]
    return []


def _custom(manifest: dict[str, Any], key: tuple[str, str]) -> list[str]:
    return [f"{error.json_path}: {error.message[:300]}" for error in _validator(key).iter_errors(manifest)]


@functools.cache
def _validator(key: tuple[str, str]) -> jsonschema.Draft202012Validator:
    schema = closed(custom_resources()[key]["schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's schema as JSON Schema that refuses fields which the API server would drop in silence."""
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-") and key != "nullable"}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("type", None)
        result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in schema:
        result["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            result[key] = closed(schema[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in schema:  # these only add conditions: what fields there are is said beside them
            result[key] = schema[key]
    open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if schema.get("type") == "object" and "additionalProperties" not in schema and not open_ended:
        result["additionalProperties"] = False
    return {"anyOf": [result, {"type": "null"}]} if schema.get("nullable") else result
