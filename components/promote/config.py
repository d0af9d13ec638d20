"""Settings of the promote step."""

from pydantic import Field

from tuneloop.config import StrictModel


class PromoteConfig(StrictModel):
    """Which registry, which adapter name, which alias."""

    registry: str = "registry"  # a local path or s3://bucket/prefix
    adapter_name: str = Field(default="adapter", pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    alias: str = Field(default="production", pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
