"""Settings of `[tracking]`."""

from typing import Literal

from pydantic import Field

from tuneloop.config import StrictModel


class MlflowSettings(StrictModel):
    """An MLflow server, or a folder. User and password, or a token, come from MLflow's own environment variables."""

    uri: str = ""  # http(s)://…, databricks, a folder; empty: MLFLOW_TRACKING_URI
    experiment: str = Field(default="tuneloop", min_length=1)


class WandbSettings(StrictModel):
    """Weights & Biases. The API key comes from WANDB_API_KEY or ~/.netrc; a server of one's own from WANDB_BASE_URL."""

    project: str = Field(default="tuneloop", min_length=1)
    entity: str = ""  # a user or team; empty: the key's own
    mode: Literal["online", "offline", "disabled"] = "online"  # offline writes a folder for `wandb sync`


class TrackingSettings(StrictModel):
    """Where training's metrics go beside `metrics.jsonl` and TensorBoard, which are always written."""

    mlflow: MlflowSettings | None = None
    wandb: WandbSettings | None = None
