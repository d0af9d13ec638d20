"""Settings of the launcher: in the step's own pod, or as a TrainJob over several nodes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.cluster_config import Cpu, DnsName, Memory
from tuneloop.config import StrictModel
from tuneloop.settings import PositiveInt
from tuneloop.training.settings import DistributedSettings


class TrainJobSettings(StrictModel):
    """The nodes of a TrainJob; images, variables, secrets, queue and placement are those of `[cluster]`."""

    runtime: DnsName = "tuneloop"  # the ClusterTrainingRuntime
    nodes: Annotated[int, Field(ge=1, le=1024)] = 2
    gpus: Annotated[int, Field(ge=0, le=64)] = 8  # of a node, one process each; 0: `processes` on CPUs
    cpu: Cpu = "8"  # of a node
    memory: Memory = "64Gi"  # of a node
    queue_timeout_seconds: PositiveInt = 86_400  # without running: queued, or pods that do not start
    timeout_seconds: PositiveInt = 259_200  # of running
    patience_seconds: PositiveInt = 600  # with an API server that does not answer


class LauncherSettings(DistributedSettings):
    """Several processes: on this machine, or on the nodes of a TrainJob. Decides no result."""

    launcher: Literal["inline", "trainjob"] = "inline"
    trainjob: TrainJobSettings = TrainJobSettings()

    @property
    def processes_per_node(self) -> int:
        """How many processes each node of the TrainJob starts."""
        if self.trainjob.gpus or self.processes == "auto":
            return max(1, self.trainjob.gpus)
        return self.processes

    @model_validator(mode="after")
    def _a_process_has_a_gpu(self) -> "LauncherSettings":
        if self.launcher == "trainjob" and self.trainjob.gpus and self.processes not in ("auto", self.trainjob.gpus):
            raise ValueError(f"processes = {self.processes}, but a node of the TrainJob has trainjob.gpus = "
                             f'{self.trainjob.gpus}, one for each process: set processes = "auto"')  # fmt: skip
        return self
