"""What a finished step leaves beside its output: `step.json`."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from tuneloop import __version__
from tuneloop.errors import UserError

RESULT = "step.json"
Summary = dict[str, float | int | str | bool | None]


@dataclass(frozen=True)
class StepResult:
    """The content of `step.json`."""

    step: str
    fingerprint: str
    seconds: float
    peak_rss_bytes: int
    summary: Summary
    config_digest: str
    inputs: dict[str, str] = field(default_factory=dict)
    code_version: str = __version__
    finished_at: str = ""

    @classmethod
    def read(cls, output: Path) -> "StepResult":
        """The result that the folder `output` holds.

        Raises:
            UserError: the folder was not made by a step of ours.
        """
        try:
            content = (output / RESULT).read_bytes()
        except OSError:
            content = b""
        return cls.parse(content, str(output))

    @classmethod
    def parse(cls, content: bytes, name: str) -> "StepResult":
        """The result in the bytes of a `step.json`.

        Raises:
            UserError: it is none; `name` is the output that the line names.
        """
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            raise UserError(f"{name}: holds no finished step (no readable {RESULT}); name another folder") from None

    def write(self, output: Path) -> None:
        """Leave it in the folder `output`."""
        (output / RESULT).write_text(json.dumps(self.__dict__, indent=2) + "\n")
