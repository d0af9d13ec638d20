"""What a submit asks for, and what of it can be refused before any server is asked.

Imports neither torch, kfp nor kubernetes.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace

from components.check.hardware import refusal
from components.check.plan_inputs import plan_inputs
from components.config import RunConfig
from pipelines.kfp_rendering import config_text
from pipelines.placement import require_no_password, require_reachable
from tuneloop.errors import UserError
from tuneloop.plan.devices import find_gpu
from tuneloop.plan.plan import make_plan
from tuneloop.storage import is_remote, join_uri

_NAME = r"[a-z0-9]([-a-z0-9]{0,50}[a-z0-9])?"  # of a Kubernetes object, with room for the number of an attempt
_LONGEST_CONFIG_NAME = 40
_POD_MODELS = ("hf", "s3", "bundled", "tiny")  # schemes of models that a pod can fetch


@dataclass(frozen=True)
class Submission:
    """One run that is to be.

    Attributes:
        name: of the run on every backend, and of its folder in the store.
        runs_uri: the folder of all runs.
    """

    config: RunConfig
    name: str
    runs_uri: str

    @property
    def output_uri(self) -> str:
        """The run folder."""
        return join_uri(self.runs_uri, self.name)

    @property
    def arguments(self) -> dict[str, str]:
        """The pipeline's parameters; those left out are at the defaults that mean "as in the config"."""
        return {"config": config_text(self.config), "output_uri": self.output_uri}

    def renamed(self, name: str) -> "Submission":
        """The same run under another name, into another folder."""
        return replace(self, name=name)


def prepare(config: RunConfig, runs_uri: str, name: str | None = None) -> Submission:
    """Decide on the run's name and folder.

    The default name is made of what decides the run's result and of where it goes, so that the same submit means the
    same run. `[cluster]` is not part of it: a run that failed for lack of memory continues with more of it.

    Args:
        runs_uri: s3://bucket/prefix of all runs.
        name: of the run; None for `<config name>-<digest>`.

    Raises:
        UserError: something of it only this machine could reach, or the name cannot name a run.
    """
    if not is_remote(runs_uri) or not runs_uri.removeprefix("s3://").partition("/")[0]:
        raise UserError(
            f"--output {runs_uri or '(none)'}: steps of a cluster share an object store and no disk; name "
            "s3://bucket/prefix, the folder of all runs"
        )
    require_reachable(config)
    require_no_password(config)
    _require_fetchable(config)
    if name is not None and not re.fullmatch(_NAME, name):
        raise UserError(f"--run {name!r}: use at most 52 of a-z, 0-9 and '-', and neither begin nor end with '-'")
    return Submission(config, name or default_name(config, runs_uri), runs_uri.rstrip("/"))


def default_name(config: RunConfig, runs_uri: str) -> str:
    """`<config name>-<first 10 hex digits of sha256 over the config without [cluster], and runs_uri>`."""
    decisive = config.model_dump(mode="json", exclude={"cluster"})
    text = json.dumps([decisive, runs_uri.rstrip("/")], sort_keys=True)
    words = re.sub(r"[^a-z0-9]+", "-", config.name)[:_LONGEST_CONFIG_NAME].strip("-")
    return f"{words}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _require_fetchable(config: RunConfig) -> None:
    scheme, separator, _ = config.model.uri.partition("://")
    if not separator or scheme not in _POD_MODELS:
        raise UserError(
            f"model.uri = {config.model.uri}: is on this machine, and pods cannot read it; put it into an object store "
            "and name s3://bucket/prefix, or name a model of the hub, hf://organisation/name"
        )
    for number, source in enumerate(config.data_prep.sources):
        local = source.kind in ("jsonl", "parquet", "gsm8k") or source.uri.startswith((".", "/", "~", "file://"))
        if source.uri and local and not is_remote(source.uri):
            raise UserError(
                f"data_prep.sources[{number}].uri = {source.uri}: is on this machine, and pods cannot read it; put it "
                "into an object store and name s3://bucket/name"
            )
    start = config.lora.start_from
    if (start and "://" not in start) or start.startswith("file://"):
        raise UserError(f"lora.start_from = {start}: is on this machine, and pods cannot read it; name s3://…")


def require_fit(config: RunConfig) -> str:
    """Plan the run on the GPUs that `[check]` names; returns one line that says how full they get.

    Raises:
        UserError: it cannot fit; the message says what limits it and what to change.
    """
    check = config.check
    if not check.gpu or check.gpu == "cpu":
        return "plan: not made, because [check] gpu names none; the check step plans on its own machine"
    device = find_gpu(check.gpu)
    try:
        inputs = plan_inputs(config)
    except UserError as error:
        return f"plan: not made here ({error}); the check step makes it"
    plan = make_plan(inputs, device, check.gpus, check.host_memory_bytes)
    if not plan.fits:
        raise UserError(refusal(plan, inputs, config))
    share = plan.needed / device.memory_bytes
    return f"plan: fits {check.gpus} x {device.kind}, {share:.0%} of each GPU's memory at the most"
