"""Settings of the check step."""

from typing import Annotated

from pydantic import Field, field_validator

from tuneloop.config import StrictModel
from tuneloop.errors import UserError
from tuneloop.plan.devices import find_gpu
from tuneloop.settings import PositiveInt


class CheckConfig(StrictModel):
    """What the check step demands of the machine before anything runs."""

    min_free_disk_bytes: Annotated[int, Field(ge=0)] = 1_000_000_000
    gpu: str = ""  # the kind that the run is meant for, one of `python -m pipelines plan --help`; empty: not checked
    gpus: PositiveInt = 1  # of that kind, in one machine
    host_memory_bytes: Annotated[int, Field(ge=0)] = 0  # of the machine that trains; 0: not known

    @field_validator("gpu")
    @classmethod
    def _gpu_is_known(cls, kind: str) -> str:
        if kind:
            try:
                find_gpu(kind)
            except UserError as error:
                raise ValueError(str(error)) from None
        return kind
