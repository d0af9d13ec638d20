"""Settings of the check step."""

from typing import Annotated

from pydantic import Field

from tuneloop.config import StrictModel


class CheckConfig(StrictModel):
    """What the check step demands of the machine before anything runs."""

    min_free_disk_bytes: Annotated[int, Field(ge=0)] = 1_000_000_000
