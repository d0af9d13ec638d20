"""Whether the images of these very sources can be run here: fixtures."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from images.build import IMAGES, SOURCE_LABEL, image_name, source_digest
from images.podman import BUILD, environment, inspect


@pytest.fixture(scope="session")
def built_images() -> dict[str, dict]:
    """Image -> what Podman knows of it. Skips where they are not built; `make test-images` builds and requires them."""
    missing = _missing()
    if missing and os.environ.get("TUNELOOP_IMAGES") == "required":
        pytest.fail(missing)
    if missing:
        pytest.skip(missing)
    return {name: inspect(image_name(name)) or {} for name in IMAGES}


@pytest.fixture(scope="session")
def podman_socket(built_images, tmp_path_factory) -> Iterator[str]:
    """DOCKER_HOST of a Podman service of our own."""
    socket = tmp_path_factory.mktemp("podman") / "podman.sock"
    service = subprocess.Popen(["podman", "system", "service", "--time=0", f"unix://{socket}"], env=environment())
    try:
        for _ in range(100):
            if Path(socket).exists():
                break
            time.sleep(0.1)
        yield f"unix://{socket}"
    finally:
        service.terminate()
        service.wait()


def _missing() -> str:
    if not shutil.which("podman"):
        return "podman is not installed: make test-images"
    for name in IMAGES:
        found = inspect(image_name(name))
        if found is None:
            return f"{image_name(name)} is not built: make test-images"
        if (found.get("Labels") or {}).get(SOURCE_LABEL) != source_digest():
            return f"{image_name(name)} is built from other sources: make test-images"
        if not (BUILD / f"{name}.cdx.json").is_file():
            return f"{image_name(name)} was built from another folder: make test-images"
    return ""
