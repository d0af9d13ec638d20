"""Build the images with Podman: `python -m images.build --base debian --flavour cpu`."""

import configparser
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from components.command_line import CommandLine
from components.exit_codes import exit_code_of
from images.podman import BUILD, inspect, podman, ready, run_restricted
from tuneloop import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGES = ("base", "train")
DEFAULT_BASE = "python:3.11-slim-bookworm"
SBOM = "/opt/venv/sbom.cdx.json"
SOURCE_LABEL, FLAVOUR_LABEL = "tuneloop.source-digest", "tuneloop.flavour"
_CONTEXT = ("pyproject.toml", "constraints.txt", "README.md", "requirements", "tuneloop", "components", "images")


def image_name(name: str) -> str:
    """What an image built here is called; Podman puts `localhost/` before names without a registry."""
    return f"localhost/tuneloop/{name}:{__version__}"


def source_digest() -> str:
    """sha256 (hex) over every file that an image is made of, so that an image of other sources is told apart."""
    digest = hashlib.sha256()
    for path in _source_files():
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(REPOSITORY)} {content}\n".encode())
    return digest.hexdigest()


def build_image(name: str, base: str, flavour: str, torch_index: str = "") -> str:
    """Build one image, and write its bill of materials to build/images/<name>.cdx.json.

    Args:
        name: `base` or `train`.
        base: the image to build on, with Python 3.11 and venv.
        flavour: of the train image, `cuda` or `cpu`.
        torch_index: where pip finds torch's CPU build; empty: where pip looks anyway.

    Returns:
        The image's name.
    """
    values = {"BASE": base, "VERSION": __version__, "REVISION": _revision(), "SOURCE_DIGEST": source_digest()}
    if name == "train":
        values |= {"FLAVOUR": flavour} | ({"TORCH_INDEX": torch_index} if torch_index else {})
    arguments = [f"--build-arg={key}={value}" for key, value in values.items()]
    file = f"--file={REPOSITORY}/images/{name}/Dockerfile"
    with tempfile.TemporaryDirectory() as folder:
        # The host's network: a bridge needs rights that not every machine gives, and pip needs only the way out.
        podman("build", "--network=host", "--layers", file, f"--tag={image_name(name)}", *arguments,
               *_pip_like_here(Path(folder)), str(REPOSITORY), quiet=False)  # fmt: skip
    (BUILD / f"{name}.cdx.json").write_text(run_restricted(image_name(name), "cat", SBOM) + "\n")
    return image_name(name)


def main(argv: Sequence[str] | None = None) -> int:
    """Build what the command line asks for; returns the exit code."""
    parser = CommandLine(prog="python -m images.build", description="Build the images with Podman.")
    parser.add_argument(
        "--base", default=DEFAULT_BASE,
        help=f"image with Python 3.11 to build on, best by digest; or debian: bootstrap one here ({DEFAULT_BASE})",
    )  # fmt: skip
    parser.add_argument("--flavour", choices=("cuda", "cpu"), default="cuda", help="of the train image (cuda)")
    parser.add_argument("--torch-index", default="", help="where pip finds torch's CPU build")
    parser.add_argument("--only", choices=IMAGES, help="build this image alone")
    arguments = parser.parse_args(argv)

    def build() -> None:
        debian = ready()
        base = debian if arguments.base == "debian" else arguments.base
        for name in [arguments.only] if arguments.only else IMAGES:
            started = time.perf_counter()
            image = build_image(name, base, arguments.flavour, arguments.torch_index)
            found = inspect(image) or {}
            print(f"{image}: {found['Size'] / 1e6:,.0f} MB, {time.perf_counter() - started:.0f} s", flush=True)

    return exit_code_of(build)


def _source_files() -> Iterator[Path]:
    for name in _CONTEXT:
        path = REPOSITORY / name
        found = [path] if path.is_file() else (file for file in path.rglob("*") if file.is_file())
        yield from sorted(file for file in found if "__pycache__" not in file.parts)


def _revision() -> str:
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _pip_like_here(folder: Path) -> list[str]:
    """Options that give pip in the build this machine's indexes and certificates, and leave no trace in the image."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):  # the environment wins
        name, _, value = line.partition("=")
        section, _, key = name.partition(".")
        if section in ("global", "install", ":env:") and key != "config-file":
            settings[key.lstrip(".")] = value.strip("'\"").replace("\\n", " ")
    if not settings:
        return []
    config = configparser.RawConfigParser()
    config["global"] = settings
    with (folder / "pip.conf").open("w") as file:
        config.write(file)
    places = [str(folder / "pip.conf") + ":/etc/pip.conf"]
    words = [word.removeprefix("file://") for value in settings.values() for word in value.split()]
    # An index in a folder links to files beside it.
    words = [word.rstrip("/").removesuffix("/simple") for word in words]
    places += [f"{word}:{word}" for word in words if os.path.isabs(word) and os.path.exists(word)]
    return [f"--volume={place}:ro" for place in dict.fromkeys(places)]


if __name__ == "__main__":
    sys.exit(main())
