"""A real kube-apiserver over a real etcd, without controllers: what the doubles say, said by Kubernetes itself.

The binaries are found as controller-runtime's envtest finds them: in the folder that KUBEBUILDER_ASSETS names
(https://book.kubebuilder.io/reference/envtest.html; `setup-envtest use` fetches them). Custom resources are those of
`crds/`. Garbage collection, which is a controller's work, is done by a thread.
"""

import contextlib
import functools
import gzip
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes
import pytest
import urllib3
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.cluster.kube_api import NAMESPACE
from tests.cluster.rendering import kubectl, overlay

ASSETS = "KUBEBUILDER_ASSETS"
ACCOUNTS = ("tuneloop-submitter", "tuneloop-launcher")
OVERLAY = "dev"  # with the rights that the accounts have
_START_SECONDS = 90.0
_OF_ARGO = ("Workflow", "workflows")  # Argo installs it with a schema that keeps everything
_IS_NOT_STRUCTURAL = ("x-kubernetes-list-map-keys", "x-kubernetes-list-type", "x-kubernetes-map-type")


class ApiServer:
    """The running server.

    Attributes:
        url: where it listens.
        admin: the custom objects, with every right.
        core: the rest of them.
    """

    def __init__(self, folder: Path, url: str):
        self._folder, self.url = folder, url
        client = kubernetes.config.new_client_from_config(str(self.kubeconfig("admin")))
        self.admin: Any = kubernetes.client.CustomObjectsApi(client)
        self.core: Any = kubernetes.client.CoreV1Api(client)

    def kubeconfig(self, account: str) -> Path:
        """The file with which one is that account."""
        path = self._folder / f"{account}.yaml"
        cluster = {"server": self.url, "certificate-authority": str(self._folder / "certificates" / "apiserver.crt")}
        content = {
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": cluster}],
            "users": [{"name": "me", "user": {"token": f"token-of-{account}"}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": NAMESPACE}}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(content))
        return path

    def kubectl(self, manifests: list[dict[str, Any]], *arguments: str) -> str:
        """What `kubectl` says of some objects."""
        command = [kubectl(), f"--kubeconfig={self.kubeconfig('admin')}", *arguments, "--filename=-"]
        done = subprocess.run(command, input=yaml.safe_dump_all(manifests), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout


def definitions() -> list[dict[str, Any]]:
    """The CustomResourceDefinitions, made from their schemas."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((Path(__file__).parent / "crds").glob("*.json.gz")):
        content, plural = json.loads(gzip.decompress(path.read_bytes())), path.name.split("_")[1]
        _add_version(found, plural, content)
    kind, plural = _OF_ARGO
    kept = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    _add_version(found, plural, {"group": "argoproj.io", "version": "v1alpha1", "kind": kind, "scope": "Namespaced",
                                 "schema": kept})  # fmt: skip
    return list(found.values())


def _add_version(found: dict[str, dict[str, Any]], plural: str, content: dict[str, Any]) -> None:
    name = f"{plural}.{content['group']}"
    names = {"kind": content["kind"], "plural": plural, "singular": content["kind"].lower()}
    definition = found.setdefault(name, {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": name, "annotations": {"api-approved.kubernetes.io": "unapproved, a test"}},
        "spec": {"group": content["group"], "scope": content["scope"], "names": names, "versions": []},
    })  # fmt: skip
    versions = definition["spec"]["versions"]
    for version in versions:
        version["storage"] = False
    versions.append({"name": content["version"], "served": True, "storage": True,
                     "schema": {"openAPIV3Schema": _structural(content["schema"])}})  # fmt: skip


def _structural(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_structural(item) for item in schema]
    if isinstance(schema, dict):
        return {key: _structural(value) for key, value in schema.items() if key not in _IS_NOT_STRUCTURAL}
    return schema


@functools.cache
def _assets() -> Path:
    folder = Path(os.environ.get(ASSETS, ""))
    missing = [name for name in ("etcd", "kube-apiserver") if not (folder / name).is_file()]
    if not os.environ.get(ASSETS) or missing:
        pytest.skip(f"{ASSETS} names no folder with etcd and kube-apiserver: setup-envtest use")
    return folder


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _write_credentials(folder: Path) -> None:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "accounts.key").write_bytes(key.private_bytes(*form))
    group = f"system:serviceaccounts,system:serviceaccounts:{NAMESPACE}"
    lines = ["token-of-admin,admin,admin,system:masters"]
    lines += [f'token-of-{name},system:serviceaccount:{NAMESPACE}:{name},{name},"{group}"' for name in ACCOUNTS]
    (folder / "tokens.csv").write_text("\n".join(lines) + "\n")


@contextlib.contextmanager
def _process(log: Path, *command: str) -> Iterator[None]:
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def _collect(server: ApiServer, leaving: threading.Event) -> None:
    """What the garbage collector does to objects that nothing depends on: take its finalizers away."""
    kinds = [(one["spec"]["group"], one["spec"]["versions"][-1]["name"], one["spec"]["names"]["plural"])
             for one in definitions() if one["spec"]["scope"] == "Namespaced"]  # fmt: skip
    while not leaving.wait(0.2):
        for kind in kinds:
            for found in server.admin.list_namespaced_custom_object(*kind[:2], NAMESPACE, kind[2])["items"]:
                if "deletionTimestamp" in found["metadata"]:
                    with contextlib.suppress(kubernetes.client.ApiException):  # gone meanwhile
                        server.admin.patch_namespaced_custom_object(
                            *kind[:2], NAMESPACE, kind[2], found["metadata"]["name"], {"metadata": {"finalizers": None}}
                        )


@pytest.fixture(scope="module")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """The server with the custom resources, and with what one overlay puts into the namespace."""
    assets, folder = _assets(), tmp_path_factory.mktemp("api-server")
    etcd, peer, port = (_free_port() for _ in range(3))
    _write_credentials(folder)
    stored = (f"--data-dir={folder / 'etcd'}", f"--listen-client-urls=http://127.0.0.1:{etcd}",
              f"--advertise-client-urls=http://127.0.0.1:{etcd}", f"--listen-peer-urls=http://127.0.0.1:{peer}",
              f"--initial-advertise-peer-urls=http://127.0.0.1:{peer}",
              f"--initial-cluster=default=http://127.0.0.1:{peer}")  # fmt: skip
    served = (f"--etcd-servers=http://127.0.0.1:{etcd}", f"--secure-port={port}", "--bind-address=127.0.0.1",
              f"--cert-dir={folder / 'certificates'}", f"--token-auth-file={folder / 'tokens.csv'}",
              "--authorization-mode=RBAC", "--service-cluster-ip-range=10.0.0.0/24",
              "--disable-admission-plugins=ServiceAccount", f"--service-account-issuer=https://127.0.0.1:{port}",
              f"--service-account-key-file={folder / 'accounts.key'}",
              f"--service-account-signing-key-file={folder / 'accounts.key'}")  # fmt: skip
    with (
        _process(folder / "etcd.log", str(assets / "etcd"), *stored),
        _process(folder / "api-server.log", str(assets / "kube-apiserver"), *served),
    ):
        server = _ready(folder, f"https://127.0.0.1:{port}")
        server.kubectl(definitions(), "create")  # apply keeps a copy in an annotation, which ends at 256 KB
        _await_kinds(server)
        server.kubectl(overlay(OVERLAY), "apply")
        leaving = threading.Event()
        collector = threading.Thread(target=_collect, args=(server, leaving), daemon=True)
        collector.start()
        yield server
        leaving.set()
        collector.join(10)


def _ready(folder: Path, url: str) -> ApiServer:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            assert (folder / "certificates" / "apiserver.crt").exists()
            server = ApiServer(folder, url)
            server.core.api_client.call_api("/readyz", "GET", auth_settings=["BearerToken"], response_type="str")
            return server
        except (AssertionError, urllib3.exceptions.HTTPError, kubernetes.client.ApiException):
            if time.monotonic() > deadline:
                raise AssertionError((folder / "api-server.log").read_text()[-3000:]) from None
            time.sleep(0.5)


def _await_kinds(server: ApiServer) -> None:
    """Until every custom resource is served."""
    api = kubernetes.client.ApiextensionsV1Api(server.core.api_client)
    deadline = time.monotonic() + _START_SECONDS
    while True:
        found = api.list_custom_resource_definition().items
        conditions = [{one.type: one.status for one in each.status.conditions or []} for each in found]
        if all(its.get("Established") == "True" for its in conditions):
            return
        assert time.monotonic() < deadline, conditions
        time.sleep(0.5)
