"""Run folders in an object store: making one, and finding one again."""

from components.config import RunConfig, load_run_config
from pipelines.runs import run_name
from tuneloop.config import resolved_json
from tuneloop.errors import UserError
from tuneloop.storage import ABSENT, VersionConflict, join_uri, open_storage


def create_run(config: RunConfig, output: str, name: str | None = None) -> str:
    """Make a new run with its `config.json`, and return its URI.

    Args:
        output: s3://bucket/prefix of all runs.
        name: the run's name; None for `<config name>-<UTC time>-<config digest>`.

    Raises:
        UserError: the name is taken or no folder name, or the store refuses.
        TryAgain: the store is unavailable.
    """
    uri = join_uri(output, run_name(config, name))
    try:
        open_storage(uri).write_bytes("config.json", resolved_json(config).encode(), if_version=ABSENT)
    except VersionConflict:
        raise UserError(f"{uri}: exists; continue it with --resume {uri}, or name another") from None
    return uri


def find_run(uri: str) -> RunConfig:
    """The config that a run was started with.

    Raises:
        UserError: there is no such run.
        TryAgain: the store is unavailable.
    """
    if not open_storage(uri).exists("config.json"):
        raise UserError(f"{uri}: no such run; name the prefix that holds config.json")
    return load_run_config(join_uri(uri, "config.json"))
