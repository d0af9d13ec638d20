"""`submit`: refuse what can be refused here, then start the run once, however often it is asked for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from components.config import RunConfig
from pipelines.cluster.run_view import CANCELLED, CANCELLING, FAILED, SKIPPED, Backend, RunView
from pipelines.cluster.submission import Submission, prepare, require_fit
from tuneloop.errors import TryAgain, UserError

_STARTED_AGAIN = (FAILED, CANCELLED, SKIPPED)
_MOST_COPIES = 1000


class Starter(Backend, Protocol):
    """A backend that starts runs."""

    def start(self, wanted: Submission, after: RunView | None) -> RunView:
        """Start a run; what was made for it is removed again when it cannot be started."""
        ...


def submit(
    config: RunConfig, runs_uri: str, connect: Callable[[], Starter], name: str | None = None, again: bool = False
) -> tuple[Starter, RunView, str]:
    """Start a run, or find that it has been started before.

    Args:
        runs_uri: s3://bucket/prefix of all runs.
        connect: gives the backend; called when nothing is left that can be refused without it.
        name: of the run; None for the default one.
        again: start another run of the same, into a folder of its own.

    Returns:
        The backend, the run, and its folder.

    Raises:
        UserError: the config, the plan or the server refuses.
        TryAgain: the server is away.
    """
    wanted = prepare(config, runs_uri, name)
    print(require_fit(config), flush=True)
    backend = connect()
    before = backend.find(wanted.name)
    if before is not None and again:
        wanted, before = _next_copy(backend, wanted), None
    if before is not None:
        _require_same(before, wanted)
        if before.state == CANCELLING:
            raise TryAgain(f"{wanted.name}: is being cancelled; submit again when that has ended")
        if before.state not in _STARTED_AGAIN:
            print(f"run: {wanted.name} was submitted before and is {before.state}; nothing is started "
                  "(--again starts another one)", flush=True)  # fmt: skip
            return _said(backend, before, wanted)
    run = backend.start(wanted, before)
    how = f"started again, because it {_how_it_ended(before)}; finished steps are kept" if before else "started"
    print(f"run: {wanted.name}, {how}", flush=True)
    return _said(backend, run, wanted)


def _how_it_ended(run: RunView) -> str:
    return {FAILED: "failed", CANCELLED: "was cancelled"}.get(run.state, "was skipped")


def _said(backend: Starter, run: RunView, wanted: Submission) -> tuple[Starter, RunView, str]:
    print(f"console: {backend.link(run)}\noutput: {wanted.output_uri}", flush=True)
    return backend, run, wanted.output_uri


def _decisive(config: str) -> dict[str, Any]:
    """What of a run's config, as JSON, decides its result."""
    try:
        return {key: value for key, value in json.loads(config).items() if key != "cluster"}
    except (ValueError, AttributeError):
        return {}


def _next_copy(backend: Backend, wanted: Submission) -> Submission:
    for number in range(2, _MOST_COPIES):
        copy = wanted.renamed(f"{wanted.name}-{number}")
        if backend.find(copy.name) is None:
            return copy
    raise UserError(f"{wanted.name}: has {_MOST_COPIES} copies; name the run with --run")


def _require_same(before: RunView, wanted: Submission) -> None:
    """Refuse a name that stands for another run."""
    if _decisive(before.parameters.get("config", "")) != _decisive(wanted.arguments["config"]):
        raise UserError(f"{wanted.name}: is the name of a run with another config; name another one with --run")
    if before.output_uri.rstrip("/") != wanted.output_uri:
        raise UserError(
            f"{wanted.name}: is the name of a run into {before.output_uri or 'an unknown folder'}; name another one "
            "with --run"
        )


def write_vertex_package(config: RunConfig, runs_uri: str, file: Path | None, name: str | None) -> str:
    """Write the package that Vertex AI takes; returns what a person does with it.

    Raises:
        UserError: the config cannot run there, or the file cannot be written.
    """
    wanted = prepare(config, runs_uri, name)
    print(require_fit(config), flush=True)
    from pipelines.kfp_rendering import portable_package

    package = portable_package(config)
    path = file or Path(f"{wanted.name}.vertex.yaml")
    try:
        path.write_text(package, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--package {path}: cannot be written ({error.strerror}); name another file") from None
    return "\n".join([
        f"wrote {path}",
        "1. open https://console.cloud.google.com/vertex-ai/pipelines/runs and choose the project and region",
        f"2. Create run → Upload file → {path}",
        f"3. Run name: {wanted.name}; continue to the runtime configuration",
        "4. Cloud storage location: a gs:// folder of your own, for Vertex's records",
        f"5. output_uri: {wanted.output_uri}; leave the other parameters as they are",
        "6. Submit; when it has ended: "
        f"python -m pipelines report {wanted.output_uri}",
    ])  # fmt: skip
