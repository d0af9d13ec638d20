"""What `doctor` asks object stores and image registries."""

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from pipelines.cluster.not_checked import NotChecked
from tuneloop.errors import UserError
from tuneloop.storage import ABSENT, VersionConflict, open_storage

_MANIFESTS = ", ".join((
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
))  # fmt: skip
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_SECONDS = 15.0
_NOBODYS = f'"{"0" * 32}"'  # no object's version


def look_at_store(uri: str) -> str:
    """Write, read, replace on a condition, and delete an object below `uri`.

    Raises:
        UserError: the store refuses one of them.
        TryAgain: it is away.
    """
    storage, key, content = open_storage(uri), f"doctor-{uuid.uuid4().hex[:12]}", b"written by tuneloop's doctor"
    storage.write_bytes(key, content, if_version=ABSENT)
    try:
        if storage.read_bytes(key) != content:
            raise UserError("gives back other bytes than were written; use another store")
        for header, version in (("If-None-Match", ABSENT), ("If-Match", _NOBODYS)):
            try:
                storage.write_bytes(key, content, if_version=version)
            except VersionConflict:
                continue
            raise UserError(f"ignores {header} on PUT, so two runs could both promote; use a store that honours it")
    finally:
        storage.delete(key)
    return "written, read, guarded by conditions, deleted; with the credentials of this machine"


def look_at_image(image: str, pull_secrets: Sequence[str]) -> str:
    """Ask an image's registry for its manifest, as anybody (OCI distribution specification).

    Raises:
        UserError: there is no such image.
        NotChecked: it takes credentials that only the cluster has, or the registry cannot be reached from here.
    """
    registry, repository, reference = split_image(image)
    scheme = "http" if registry.rpartition(":")[0] in ("localhost", "127.0.0.1") else "https"
    url = f"{scheme}://{registry}/v2/{repository}/manifests/{reference}"
    try:
        status, headers = _head(url, None)
        if status == 401 and (token := _anonymous_token(headers.get("WWW-Authenticate", ""), repository)):
            status, headers = _head(url, token)
    except OSError as error:
        raise NotChecked(f"{registry} cannot be reached from here ({error})") from None
    if status == 200:
        return f"is there, {headers.get('Docker-Content-Digest', 'of unknown digest')}"
    if status == 404:
        raise UserError(
            f"{registry} has no such image: push it, or correct [cluster] base_image and train_image (docs/compile.md)"
        )
    if status in (401, 403):
        with_secrets = f", which the cluster has in {', '.join(pull_secrets)}" if pull_secrets else (
            "; name the Secret that holds them in [cluster] image_pull_secrets"
        )  # fmt: skip
        raise NotChecked(f"{registry} wants credentials{with_secrets}")
    raise NotChecked(f"{registry} answers {status}")


def split_image(image: str) -> tuple[str, str, str]:
    """Registry, repository, and tag or digest, as container runtimes read a reference."""
    name, at, digest = image.partition("@")
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        registry, path = first, rest
    else:
        registry, path = "registry-1.docker.io", name if slash else f"library/{name}"
    path, _, tag = path.partition(":")
    return registry, path, digest if at else tag


def _head(url: str, token: str | None) -> tuple[int, Any]:
    import urllib3

    headers = {"Accept": _MANIFESTS, **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        answer = urllib3.request("HEAD", url, headers=headers, timeout=_SECONDS, retries=False)
    except urllib3.exceptions.HTTPError as error:
        raise OSError(" ".join(str(error).split())) from None
    return answer.status, answer.headers


def _anonymous_token(challenge: str, repository: str) -> str | None:
    """A token that anybody gets, from where the registry sends us."""
    import urllib3

    fields = dict(_CHALLENGE.findall(challenge))
    if not challenge.lower().startswith("bearer") or "realm" not in fields:
        return None
    query = {"scope": fields.get("scope", f"repository:{repository}:pull")}
    query |= {"service": fields["service"]} if "service" in fields else {}
    try:
        answer = urllib3.request("GET", fields["realm"], fields=query, timeout=_SECONDS, retries=False)
        said = json.loads(answer.data) if answer.status == 200 else {}
    except (urllib3.exceptions.HTTPError, ValueError):
        return None
    return said.get("token") or said.get("access_token")
