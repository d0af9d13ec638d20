"""The pipeline as YAML: written by `python -m pipelines compile`, checked in, and compared in a test."""

import re
import tempfile
import warnings
from pathlib import Path

from tuneloop.errors import UserError

COMPILED = Path(__file__).resolve().parent / "compiled" / "post_training.yaml"


def compile_pipeline(path: Path = COMPILED) -> Path:
    """Compile the pipeline to the Pipelines IR at `path`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # kfp's notes to its own developers
        from kfp.compiler import Compiler

        from pipelines.post_training import post_training

        path.parent.mkdir(parents=True, exist_ok=True)
        Compiler().compile(post_training, str(path))  # pyright: ignore[reportArgumentType] - decorated
    return path


def check_compiled(path: Path = COMPILED) -> None:
    """Compare the checked-in YAML with what the pipeline compiles to now, whatever the SDK's version.

    Raises:
        UserError: they differ, or the YAML is missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        fresh = compile_pipeline(Path(folder) / path.name).read_text()
    if not path.exists() or _normalised(path.read_text()) != _normalised(fresh):
        raise UserError(f"{path} is not what the pipeline compiles to; run `python -m pipelines compile`")


def _normalised(text: str) -> str:
    return re.sub(r"(?m)^sdkVersion: .*$", "sdkVersion: any", text)
