"""The report as Argo's S3 artifact, so that Argo's console shows it.

Its place is the run folder's own, named in full: so it needs no artifact repository in the cluster. Everything else
that steps make they write there themselves, with checkpoints while they run, which Argo's artifacts could not do.
"""

from typing import Any
from urllib.parse import urlsplit

from components.config import RunConfig

_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "accessKeySecret",
    "AWS_SECRET_ACCESS_KEY": "secretKeySecret",
    "AWS_SESSION_TOKEN": "sessionTokenSecret",  # temporary ones alone have it
}
_PARTS = "split(trimSuffix(inputs.parameters.output_uri, '/'), '/')"  # of s3://bucket/prefix: s3:, empty, bucket, …


def report_artifact(config: RunConfig, path: str) -> dict[str, Any]:
    """The output artifact of the report's step.

    Args:
        path: of the page in the step's container.
    """
    return {
        "name": "report",
        "path": path,
        "archive": {"none": {}},
        "optional": True,  # a report that failed says so itself
        "s3": {
            "bucket": f"{{{{={_PARTS}[2]}}}}",
            "key": f"{{{{=join({_PARTS}[3:], '/')}}}}/report/report.html",
            **_store(config),
        },
    }


def _store(config: RunConfig) -> dict[str, Any]:
    """Where the object store is, and whose credentials open it: as for the steps themselves."""
    env = config.cluster.env
    endpoint = urlsplit(env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or "https://s3.amazonaws.com")
    store: dict[str, Any] = {"endpoint": endpoint.netloc, "insecure": endpoint.scheme == "http"}
    if region := env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION"):
        store["region"] = region
    secrets = {
        secret.variable: {"name": secret.secret, "key": secret.key}
        for secret in config.cluster.secrets
        if not secret.optional and (not secret.steps or "report" in secret.steps)  # Argo's pod waits for a missing one
    }
    if not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= secrets.keys():
        return store | {"useSDKCreds": True}
    return store | {field: secrets[name] for name, field in _CREDENTIALS.items() if name in secrets}
