"""Metrics in Weights & Biases."""

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from tuneloop.tracking.settings import WandbSettings
from tuneloop.tracking.tracker import Outcome, TrackedRun, Unavailable

CLOUD = "https://api.wandb.ai"


class WandbTracker:
    """A `Tracker` on Weights & Biases, online or into a folder that `wandb sync` uploads later.

    Raises:
        Unavailable: switched off, the package is missing, or there is no API key.
    """

    def __init__(self, settings: WandbSettings):
        if settings.mode == "disabled":
            raise Unavailable('tracking.wandb.mode is "disabled"')
        if settings.mode == "online" and not has_credentials():
            raise Unavailable('no API key; set WANDB_API_KEY, or tracking.wandb.mode = "offline"')
        try:
            import wandb
        except ImportError as error:
            raise Unavailable(f"{error.name or 'wandb'} is not installed; pip install 'tuneloop[wandb]'") from None
        self.label = f"Weights & Biases ({settings.mode}, project {settings.project})"
        self._wandb, self._settings = wandb, settings

    def open(self, run: TrackedRun) -> int:
        """See `Tracker.open`; the server ignores steps that it has, offline the record beside the log is trusted."""
        self._run = self._wandb.init(
            id=run.id,
            resume="allow" if self._settings.mode == "online" else None,
            project=self._settings.project,
            entity=self._settings.entity or None,
            mode=self._settings.mode,
            name=run.name,
            group=run.group,
            job_type=run.step,
            dir=run.folder,
            config=dict(run.parameters),
            reinit="create_new",  # several adapters' runs may be open at once
            settings=self._wandb.Settings(console="off", silent=True),
        )
        return self._run.step - 1

    def write(self, update: int, values: Mapping[str, float]) -> None:
        """See `Tracker.write`."""
        self._run.log(dict(values), step=update, commit=True)

    def close(self, outcome: Outcome) -> None:
        """See `Tracker.close`."""
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


def has_credentials() -> bool:
    """Whether an API key for the server in use is in the environment or in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or CLOUD).netloc
    try:
        known = netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(known and known[2])
