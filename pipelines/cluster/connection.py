"""Connections to Kubeflow Pipelines and to Kubernetes: where they are, who one is, and what is said when it fails.

Secrets come from the environment and never from an option, which other people on the machine could read:
`TUNELOOP_KFP_TOKEN`, `TUNELOOP_KFP_TOKEN_FILE` (read again for every request, so its owner may renew it) and
`TUNELOOP_KFP_COOKIES`. kfp's own `KF_PIPELINES_*` variables work too.
"""

import contextlib
import json
import logging
import os
import re
import ssl
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from components import kube_config
from components.api_calls import TIMEOUT_SECONDS, ApiServer, Refused
from components.kube_config import IN_CLUSTER
from tuneloop.errors import UserError

TOKEN, TOKEN_FILE, COOKIES = "TUNELOOP_KFP_TOKEN", "TUNELOOP_KFP_TOKEN_FILE", "TUNELOOP_KFP_COOKIES"
ENDPOINT = "KF_PIPELINES_ENDPOINT"


@dataclass(frozen=True)
class ConnectionSettings:
    """Where the servers are, as the command line names them.

    Attributes:
        host: URL of Kubeflow Pipelines; empty: `KF_PIPELINES_ENDPOINT`, the service of this cluster when in a pod, or
            the one that the kubeconfig's context reaches through Kubernetes' API.
        namespace: of runs; with Kubeflow Pipelines only in multi-user mode.
        kfp_namespace: where Kubeflow Pipelines itself runs.
        context: of the kubeconfig; empty: its current one.
        ca_file: certificates that sign the server's; empty: the public ones.
        iap_client_id: of Google's Identity-Aware Proxy before the server.
        ui_host: URL of the console; empty: as `host`.
        patience_seconds: how long a call is repeated for while a server is away.
    """

    host: str = ""
    namespace: str = ""
    kfp_namespace: str = "kubeflow"
    context: str = ""
    ca_file: str = ""
    iap_client_id: str = ""
    ui_host: str = ""
    patience_seconds: float = 120.0

    @property
    def endpoint(self) -> str:
        """The URL of Kubeflow Pipelines, if one is named."""
        return self.host or os.environ.get(ENDPOINT, "")


class KfpConnection:
    """Kubeflow Pipelines, ready to be called.

    Attributes:
        server: calls with patience.
        namespace: what requests name as the namespace; None in single-user mode, which knows none.
        ui: URL of the console; empty when nobody has named one.
    """

    def __init__(self, settings: ConnectionSettings):
        self._settings, self.kfp_namespace = settings, settings.kfp_namespace
        where = settings.endpoint or ("this cluster" if IN_CLUSTER in os.environ else "the kubeconfig's cluster")
        self.server = ApiServer(f"Kubeflow Pipelines at {where}", _login_advice(), settings.patience_seconds)
        self.server.renew = self._connect
        self._connect()
        multi_user = bool(self._health().get("multi_user"))
        self.namespace = settings.namespace if multi_user else None
        if multi_user and not settings.namespace:
            raise UserError(f"{self.server.name}: has several users; name your namespace with --namespace")
        ui = settings.ui_host or os.environ.get("KF_PIPELINES_UI_ENDPOINT", "") or settings.endpoint
        self.ui = ui.rstrip("/") if "://" in ui or not ui else f"https://{ui.rstrip('/')}"

    def _health(self) -> dict[str, Any]:
        """What the server says of itself; a page for people, which kfp would take for an empty answer, is refused."""
        elsewhere = f"{self.server.name}: is not its API; name the address below which /apis/v2beta1 is, or log in: "
        try:
            answer = self.server.call(
                lambda: self.client.healthzs.healthz_service_get_healthz(
                    _preload_content=False, _request_timeout=TIMEOUT_SECONDS
                )
            )
        except Refused as error:
            if error.status == 404:
                raise UserError(elsewhere + _login_advice()) from None
            raise
        try:
            found = json.loads(answer.data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(elsewhere + _login_advice())
        return found

    def _connect(self) -> None:
        self.client: Any = _kfp_client(self._settings)  # generated from the API, with return types that are no help


def _kfp_client(settings: ConnectionSettings) -> Any:
    """kfp's client: the one that knows IAP, kubeconfigs and projected service account tokens."""
    if not settings.endpoint and IN_CLUSTER not in os.environ:
        _require_context(settings.context, "name the server with --host")
    _require_address(settings)
    token = _credential(TOKEN)
    credentials = _token_file_credentials() if not token else None
    with _quiet():
        try:
            return _client_class()(
                host=settings.endpoint or None,
                client_id=settings.iap_client_id or None,
                namespace=settings.kfp_namespace,
                existing_token=token,
                cookies=_credential(COOKIES),
                ssl_ca_cert=settings.ca_file or None,
                kube_context=settings.context or None,
                credentials=credentials,
                ui_host=settings.ui_host or None,
            )
        except OSError as error:
            raise UserError(f"credentials of Kubeflow Pipelines cannot be read ({error}); {_login_advice()}") from None


def _require_address(settings: ConnectionSettings) -> None:
    """Refuse what no request could be sent to, which is not worth waiting for."""
    named, host = "--host" if settings.host else ENDPOINT, settings.endpoint
    try:
        address = urlsplit(host if "://" in host else f"https://{host}")
        is_one = address.scheme in ("http", "https") and bool(address.hostname) and not re.search(r"\s", host)
        is_one = is_one and address.port != 0  # raises ValueError when it is no number
    except ValueError:
        is_one = False
    if host and not is_one:
        raise UserError(f"{named} {host}: is no address; write https://host or http://host:port")
    if settings.ca_file:
        try:
            ssl.create_default_context(cafile=settings.ca_file)
        except ssl.SSLError:
            raise UserError(f"--ca-file {settings.ca_file}: holds no certificate in PEM format") from None
        except OSError as error:
            raise UserError(f"--ca-file {settings.ca_file}: cannot be read ({error.strerror})") from None


def _credential(variable: str) -> str | None:
    """What a variable holds, without the line break that a file ended with."""
    value = os.environ.get(variable, "").strip()
    if not (value.isascii() and value.isprintable()):
        raise UserError(f"{variable}: holds a character that a request cannot carry; copy it anew, as one line")
    return value or None


def _client_class() -> Any:
    import kfp

    class QuietClient(kfp.Client):
        """kfp's client, which leaves no file behind and asks nothing before it is told to."""

        def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
            """In place of five logged tries in the constructor: nothing, because the connection asks itself."""
            return type("NotAsked", (), {"multi_user": None})

        def set_user_namespace(self, namespace: str) -> None:
            """In place of ~/.config/kfp/context.json: nothing, because requests name their namespace."""

        def _load_config(self, *args: Any, **kwargs: Any) -> Any:
            config = super()._load_config(*args, **kwargs)
            # urllib3's own would repeat requests behind our back, and follow a redirection to a login page.
            config.retries = False  # pyright: ignore[reportAttributeAccessIssue] - untyped
            return config

    return QuietClient


def _token_file_credentials() -> Any:
    """A token that its owner renews in a file: ours, or the one that Kubernetes projects into a pod."""
    from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, KF_PIPELINES_SA_TOKEN_PATH
    from kfp.client.set_volume_credentials import ServiceAccountTokenVolumeCredentials

    variable = TOKEN_FILE if os.environ.get(TOKEN_FILE) else KF_PIPELINES_SA_TOKEN_ENV
    named = os.environ.get(variable)
    if named and not Path(named).is_file():
        raise UserError(f"{variable}={named}: no such file")
    path = named or (KF_PIPELINES_SA_TOKEN_PATH if Path(KF_PIPELINES_SA_TOKEN_PATH).is_file() else None)
    return ServiceAccountTokenVolumeCredentials(path) if path else None


def _login_advice() -> str:
    return f"set {TOKEN}, {TOKEN_FILE} or {COOKIES} to credentials that are valid now (docs/submit.md)"


class KubeConnection:
    """Kubernetes' API, ready to be called.

    Attributes:
        server: calls with patience.
        core, custom: the clients of pods and of custom objects; new ones after credentials were renewed.
        namespace: of the run.
    """

    def __init__(self, settings: ConnectionSettings):
        self._settings = settings
        self.namespace = settings.namespace
        advice = "log in to the cluster again, so that your kubeconfig holds valid credentials"
        self.server = ApiServer("Kubernetes", advice, settings.patience_seconds, renew=self._connect)
        self._connect()

    def _connect(self) -> None:
        import kubernetes

        of_the_pod = IN_CLUSTER in os.environ and not self._settings.context
        if not of_the_pod:
            _require_context(self._settings.context, "log in to the cluster")
        try:
            configuration = kube_config.configuration(self._settings.context, of_the_pod=of_the_pod)
        except kube_config.Unusable as error:
            if of_the_pod:
                raise UserError(
                    f"this pod's own credentials: {error}; mount its service account's token, or name a --context"
                ) from None
            raise UserError(f"kubeconfig: {error}; correct it, or name another one with KUBECONFIG") from None
        self.server.name = f"Kubernetes at {configuration.host}"
        client = kubernetes.client.ApiClient(configuration)
        self.core: Any = kubernetes.client.CoreV1Api(client)  # as for Kubeflow Pipelines
        self.custom: Any = kubernetes.client.CustomObjectsApi(client)


def _require_context(context: str, otherwise: str) -> None:
    try:
        names, has_current = kube_config.contexts()
    except kube_config.Unusable as error:
        raise UserError(f"no cluster is named: no usable kubeconfig ({error}); {otherwise}") from None
    if context and context not in names:
        raise UserError(f"--context {context}: the kubeconfig has no such context; it has {', '.join(names)}")
    if not context and not has_current:
        raise UserError(f"the kubeconfig has no current context; name one with --context: {', '.join(names)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep kfp's notes to its developers off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
