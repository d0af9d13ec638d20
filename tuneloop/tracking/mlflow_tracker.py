"""Metrics in MLflow."""

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tuneloop.tracking.settings import MlflowSettings
from tuneloop.tracking.tracker import Outcome, TrackedRun, Unavailable

if TYPE_CHECKING:
    from mlflow.entities import Run

ID_TAG = "tuneloop.id"
PARAMETERS_AT_ONCE = 100  # the most that one request may carry
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
# MLflow retries for minutes by default; here a later attempt is made anyway. Values that are set already win.
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # a folder that the config names is meant
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


class MlflowTracker:
    """A `Tracker` on an MLflow server or folder.

    Raises:
        Unavailable: the package is missing, or nobody says where the server is.
    """

    def __init__(self, settings: MlflowSettings):
        uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        if not uri:
            raise Unavailable("neither tracking.mlflow.uri nor MLFLOW_TRACKING_URI is set")
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise Unavailable(f"{error.name or 'mlflow'} is not installed; pip install 'tuneloop[mlflow]'") from None
        self.label = f"MLflow at {uri}"
        self._client = MlflowClient(tracking_uri=uri)
        self._experiment = settings.experiment
        self._run_id = ""

    def open(self, run: TrackedRun) -> int:
        """See `Tracker.open`; the server itself says how far it came, so a kill loses and repeats nothing."""
        experiment = self._client.get_experiment_by_name(self._experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self._experiment)
        found = self._client.search_runs([number], filter_string=f"tags.`{ID_TAG}` = '{run.id}'", max_results=1)
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return max((point.step for point in self._client.get_metric_history(self._run_id, "time")), default=-1)
        self._run_id = self._create(number, run).info.run_id
        return -1

    def _create(self, experiment: str, run: TrackedRun) -> "Run":
        from mlflow.entities import Param

        tags = {ID_TAG: run.id, "tuneloop.run": run.group, "tuneloop.step": run.step}
        created = self._client.create_run(experiment, run_name=run.name, tags=tags)
        parameters = [Param(name, str(value)) for name, value in run.parameters.items()]
        for first in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(created.info.run_id, params=parameters[first : first + PARAMETERS_AT_ONCE])
        return created

    def write(self, update: int, values: Mapping[str, float]) -> None:
        """See `Tracker.write`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, update) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, outcome: Outcome) -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self._run_id, STATUS[outcome])
