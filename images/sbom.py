"""The software bill of materials of the image this runs in, CycloneDX 1.6 JSON: `python sbom.py NAME > sbom.cdx.json`.

Needs nothing but the standard library, and lists Python's distributions and Debian's packages.
"""

import json
import platform
import re
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

DPKG_STATUS = Path("/var/lib/dpkg/status")


def python_component(package: Distribution) -> dict:
    """One installed distribution."""
    about: Any = package.metadata
    name, version = about["Name"], package.version
    found: dict[str, Any] = {
        "type": "library",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{quote(version)}",
    }
    if expression := about.get("License-Expression"):
        return found | {"licenses": [{"expression": expression}]}
    declared = about.get("License") or ""
    if declared and "\n" not in declared and len(declared) < 100:  # some put the licence's whole text there
        found["licenses"] = [{"license": {"name": declared}}]
    return found


def debian_components(status: str) -> list[dict]:
    """The installed packages that dpkg's status file names."""
    found = []
    for entry in status.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Architecture|Status): (.*)$", entry, re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            name, version, architecture = fields["Package"], fields["Version"], fields["Architecture"]
            purl = f"pkg:deb/debian/{quote(name)}@{quote(version, safe='')}?arch={architecture}"
            found.append({"type": "library", "name": name, "version": version, "purl": purl})
    return found


def bill_of_materials(name: str) -> dict:
    """Everything in this environment, under the image's name."""
    python = {"type": "framework", "name": "python", "version": platform.python_version()}
    found = {one["purl"]: one for one in map(python_component, distributions())}  # one may be on two paths
    packages = sorted(found.values(), key=lambda one: one["name"].lower())
    debian = debian_components(DPKG_STATUS.read_text()) if DPKG_STATUS.exists() else []
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": name}},
        "components": [python, *packages, *debian],
    }


if __name__ == "__main__":
    json.dump(bill_of_materials(sys.argv[1]), sys.stdout, indent=1)
