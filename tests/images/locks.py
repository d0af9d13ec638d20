"""What the files of fixed versions fix."""

from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[2]


def pins(name: str) -> dict[str, Version]:
    """The versions a file of constraints or requirements fixes, by the distribution's canonical name."""
    lines = [line for line in (REPOSITORY / name).read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines)
    found = [line.split("==") for line in lines]
    assert len({canonicalize_name(name) for name, _ in found}) == len(found)
    return {canonicalize_name(name): Version(version) for name, version in found}
