"""Where the registry keeps what, and how its JSON files are read."""

import getpass
import json
import os
import re
import socket
from datetime import UTC, datetime
from typing import Any

from tuneloop.errors import UserError
from tuneloop.storage import Damaged

NAME_PATTERN = r"[a-z0-9][a-z0-9._-]{0,62}"


def check_name(name: str, kind: str) -> None:
    """Refuse a name that cannot be an adapter's or an alias's.

    Raises:
        UserError: with the rule.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise UserError(
            f"{name!r}: not a name for an {kind}; use up to 63 lower-case letters, digits, '.', '_' and '-', the first "
            "one a letter or digit"
        )


def version_key(adapter_name: str, version: int) -> str:
    """The folder of one version."""
    return f"{adapter_name}/versions/{version}"


def alias_key(adapter_name: str, alias: str) -> str:
    """The file of one alias."""
    return f"{adapter_name}/aliases/{alias}.json"


def version_number(key: str, file: str) -> int:
    """n of `…/versions/<n>/<file>`; 0 for every other key."""
    found = re.fullmatch(rf"[^/]+/versions/([1-9]\d*)/{re.escape(file)}", key)
    return int(found[1]) if found else 0


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        Damaged: it is something else.
    """
    try:
        values = json.loads(data)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise Damaged(f"{name}: is not a JSON object; restore it from a copy")
    return values


def to_json(values: Any) -> bytes:
    """Indented JSON, as every file of the registry is written."""
    return (json.dumps(values, indent=2) + "\n").encode()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def who() -> str:
    """user@host of this process; in a pod the host is the pod's name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a user id that has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
