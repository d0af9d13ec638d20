"""Make the schemas in this folder from CustomResourceDefinitions: `python -m tests.cluster.crds.make CRD.yaml …`.

A schema is what the CRD says about a served version, without descriptions, compressed (Argo's are 2.8 MB as text).
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parent
_NOT_CHECKED = ("description", "default", "x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-map-type")


def stripped(schema: Any) -> Any:
    """A schema without what no check reads; the names of properties are kept, whatever they are."""
    if isinstance(schema, list):
        return [stripped(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key not in _NOT_CHECKED}
    properties = kept.pop("properties", None)
    result = {key: stripped(value) for key, value in kept.items()}
    if properties is not None:
        result["properties"] = {name: stripped(value) for name, value in properties.items()}
    return result


def main(files: list[str]) -> None:
    for file in files:
        crd = yaml.load(Path(file).read_text(), Loader=yaml.CSafeLoader)
        spec = crd["spec"]
        for version in spec["versions"]:
            if not version["served"]:
                continue
            content = {"group": spec["group"], "version": version["name"], "kind": spec["names"]["kind"],
                       "scope": spec["scope"], "schema": stripped(version["schema"]["openAPIV3Schema"])}  # fmt: skip
            name = f"{spec['group']}_{spec['names']['plural']}_{version['name']}.json.gz"
            data = json.dumps(content, separators=(",", ":"), sort_keys=True).encode()
            (FOLDER / name).write_bytes(gzip.compress(data, mtime=0))


if __name__ == "__main__":
    main(sys.argv[1:])
