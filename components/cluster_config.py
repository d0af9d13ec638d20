"""Settings of the cluster that a run is placed on. They change no result and no fingerprint."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from components.cron import check_cron
from components.images import BASE_IMAGE, TRAIN_IMAGE
from tuneloop.config import StrictModel
from tuneloop.errors import UserError
from tuneloop.settings import PositiveInt

QUEUE_LABEL, PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"  # of what Kueue admits

_LABEL = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS_SUBDOMAIN = rf"{_DNS_LABEL}(\.{_DNS_LABEL})*"
_ENV_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_IMAGE = re.compile(rf"[a-z0-9][a-z0-9._:/-]*?(:(?P<tag>{_TAG}))?(@(?P<digest>sha256:[0-9a-f]{{64}}))?")
PASSWORD_IN_URL = re.compile(r"://[^/\s]*:[^/\s]*@")
_SECRET_WORDS = {"KEY", "SECRET", "TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "APIKEY"}


def _image(reference: str) -> str:
    match = _IMAGE.fullmatch(reference)
    if not match or not (match["tag"] or match["digest"]):
        raise ValueError("an image is named with a tag or digest, as in registry/tuneloop/base:0.1.0")
    if match["tag"] == "latest" and not match["digest"]:
        raise ValueError("the tag latest may be another image tomorrow; name a version or a digest")
    return reference


DnsLabel = Annotated[str, Field(pattern=rf"^{_DNS_LABEL}$")]
DnsName = Annotated[str, Field(pattern=rf"^{_DNS_SUBDOMAIN}$", max_length=253)]
OptionalName = Annotated[str, Field(pattern=rf"^({_DNS_SUBDOMAIN})?$", max_length=253)]
LabelKey = Annotated[str, Field(pattern=rf"^({_DNS_SUBDOMAIN}/)?{_LABEL}$")]
LabelValue = Annotated[str, Field(pattern=rf"^({_LABEL})?$")]
Cpu = Annotated[str, Field(pattern=r"^([1-9][0-9]*|[0-9]+\.[0-9]*[1-9]|[1-9][0-9]*m)$")]
Memory = Annotated[str, Field(pattern=r"^[1-9][0-9]*(Ki|Mi|Gi|Ti|Pi|Ei|M|G|T|P|E)?$")]
EnvName = Annotated[str, Field(pattern=rf"^{_ENV_NAME}$")]
Image = Annotated[str, AfterValidator(_image)]
StepName = Literal["check", "data_prep", "sft_warmup", "lora_rl", "merge_adapter", "evaluate", "promote", "report"]


class Toleration(StrictModel):
    """A taint that a pod may be placed in spite of."""

    key: LabelKey | Literal[""] = ""  # empty: every taint, with operator "Exists"
    operator: Literal["Equal", "Exists"] = "Equal"
    value: LabelValue = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""  # empty: every effect
    seconds: Annotated[int, Field(ge=0)] | None = None  # how long; None: for ever

    @model_validator(mode="after")
    def _fields_fit_each_other(self) -> "Toleration":
        if self.operator == "Exists" and self.value:
            raise ValueError('operator = "Exists" takes no value: leave it out, or use "Equal"')
        if not self.key and self.operator != "Exists":
            raise ValueError('without a key, operator is "Exists"')
        if self.seconds is not None and self.effect != "NoExecute":
            raise ValueError('seconds are of effect = "NoExecute" only')
        return self

    def manifest(self) -> dict[str, str | int]:
        """As a pod's spec holds it."""
        fields = {"key": self.key, "operator": self.operator, "value": self.value, "effect": self.effect,
                  "tolerationSeconds": self.seconds}  # fmt: skip
        return {name: value for name, value in fields.items() if value not in ("", None)}


class SecretVariable(StrictModel):
    """One key of a Secret as an environment variable; the value is never in a rendering."""

    secret: DnsName
    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)]
    env: EnvName | Literal[""] = ""  # the key itself when empty
    optional: bool = False  # start without the variable where there is no such Secret
    steps: tuple[StepName, ...] = ()  # that get it; empty: every step

    @property
    def variable(self) -> str:
        """The environment variable's name."""
        return self.env or self.key

    @model_validator(mode="after")
    def _key_can_name_a_variable(self) -> "SecretVariable":
        if not self.env and not re.fullmatch(_ENV_NAME, self.key):
            raise ValueError(f"key {self.key!r} is no name of a variable: name one in env")
        return self


class StepResources(StrictModel):
    """What one step asks for; what is not given follows from the step: docs/compile.md."""

    cpu: Cpu | None = None
    memory: Memory | None = None  # request and limit
    gpus: Annotated[int, Field(ge=0, le=1024)] | None = None
    timeout_seconds: PositiveInt | None = None  # of one attempt


class Steps(StrictModel):
    """The resources of every step."""

    check: StepResources = StepResources()
    data_prep: StepResources = StepResources()
    sft_warmup: StepResources = StepResources()
    lora_rl: StepResources = StepResources()
    merge_adapter: StepResources = StepResources()
    evaluate: StepResources = StepResources()
    promote: StepResources = StepResources()
    report: StepResources = StepResources()


def _cron(text: str) -> str:
    try:
        return " ".join(check_cron(text).split())
    except UserError as error:
        raise ValueError(str(error)) from None


class ScheduleSettings(StrictModel):
    """When runs start by themselves: a recurring run of Kubeflow Pipelines, a CronWorkflow of Argo."""

    runs_uri: Annotated[str, Field(pattern=r"^s3://[^/]+(/.*)?$")]  # every tick makes a run folder of its own below
    schedules: Annotated[tuple[Annotated[str, AfterValidator(_cron)], ...], Field(min_length=1)] = (
        "0 3 * * *",
    )  # minute, hour, day of month, month, day of week
    timezone: Annotated[str, Field(pattern=r"^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*$")] = "Etc/UTC"
    starting_deadline_seconds: Annotated[int, Field(ge=0)] = 3600  # Argo: a tick that is later than this is left out
    suspend: bool = True  # until somebody resumes it


GPU_TAINT = Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")


class ClusterConfig(StrictModel):
    """Where and how a run is placed, never what it computes."""

    namespace: DnsLabel = "tuneloop"
    service_account: OptionalName = "tuneloop-step"  # of the steps' pods; empty: the namespace's default
    base_image: Image = BASE_IMAGE
    train_image: Image = TRAIN_IMAGE
    image_pull_secrets: tuple[DnsName, ...] = ()
    queue: OptionalName = ""  # Kueue's local queue of the steps with GPUs; empty: they are not queued
    queue_priority: OptionalName = ""  # Kueue's WorkloadPriorityClass
    gpu_resource: LabelKey = "nvidia.com/gpu"
    node_selector: dict[LabelKey, LabelValue] = {}
    gpu_node_selector: dict[LabelKey, LabelValue] = {}  # on top, for steps with GPUs
    tolerations: tuple[Toleration, ...] = ()
    gpu_tolerations: tuple[Toleration, ...] = (GPU_TAINT,)  # on top, for steps with GPUs
    env: dict[EnvName, str] = {}  # of every step, such as AWS_ENDPOINT_URL; nothing secret
    secrets: tuple[SecretVariable, ...] = ()  # none: the service account's cloud role opens the store
    shm: Memory = "8Gi"  # /dev/shm of the steps that hold a model; counts towards their memory
    retries: Annotated[int, Field(ge=0, le=100)] = 3  # of a step that was preempted or found a store unavailable
    retry_seconds: PositiveInt = 60  # before the first; later ones wait longer
    keep_days: PositiveInt = 14  # a finished Argo workflow; what it made lies in the object store
    steps: Steps = Steps()
    schedule: ScheduleSettings | None = None  # None: only when somebody submits it

    @model_validator(mode="after")
    def _no_secret_in_plain_sight(self) -> "ClusterConfig":
        for name, value in self.env.items():
            if name.upper().split("_")[-1] in _SECRET_WORDS or name.upper() == "AWS_ACCESS_KEY_ID":
                raise ValueError(f"env.{name}: looks like a credential; put it into a Secret and name it in secrets")
            if PASSWORD_IN_URL.search(value):
                raise ValueError(f"env.{name}: the URL holds a password; put it into a Secret and name it in secrets")
        names = [*self.env, *(secret.variable for secret in self.secrets)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the variable {name} is given twice in env and secrets")
        return self
