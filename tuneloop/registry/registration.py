"""How an adapter becomes a version: claim a number, upload the files, commit them by version.json.

A claim is made only if the number is free, and stays. A number whose upload was killed is taken up again by the same
files; every other adapter goes on to the next number. So numbers may have gaps, and files of two adapters never mix.
"""

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuneloop.errors import UserError
from tuneloop.registry.layout import check_name, now, to_json, version_key, version_number, who
from tuneloop.registry.versions import file_digests, read_record
from tuneloop.storage import ABSENT, Storage, VersionConflict


def register(storage: Storage, adapter_name: str, folder: Path, record: Mapping[str, Any]) -> int:
    """Store the adapter in `folder` as a new version, or find the version that already holds it.

    Args:
        record: see `Registry.register`.

    Returns:
        The version's number; its version.json is committed.

    Raises:
        UserError: not a name, or the folder is missing, empty, or changes while it is stored.
    """
    check_name(adapter_name, "adapter")
    files = {f"adapter/{name}": digest for name, digest in file_digests(folder).items()}
    if not files:
        raise UserError(f"{folder}: holds no adapter to register")
    claim = {"adapter_digest": record["adapter_digest"], "files": files}
    numbers = _numbers(storage, adapter_name)
    for number in sorted(numbers, reverse=True):
        if numbers[number] and _committed_digest(storage, adapter_name, number) == record["adapter_digest"]:
            return number
    abandoned = [number for number in numbers if not numbers[number]]
    taken_up = next((number for number in abandoned if _claim_of(storage, adapter_name, number) == claim), 0)
    number = taken_up or _claim(storage, adapter_name, max(numbers, default=0) + 1, claim)
    _upload(storage, adapter_name, number, folder, {**record, "files": files})
    return number


def _numbers(storage: Storage, adapter_name: str) -> dict[int, bool]:
    """Every number that is taken -> whether its version is committed."""
    keys = storage.list(f"{adapter_name}/versions")
    taken = {number: False for key in keys if (number := version_number(key, "claim.json"))}
    return taken | {number: True for key in keys if (number := version_number(key, "version.json"))}


def _committed_digest(storage: Storage, adapter_name: str, number: int) -> str:
    try:
        return read_record(storage, adapter_name, number)["adapter_digest"]
    except UserError as error:  # an old damaged version must not stop new ones
        print(f"warning: {error}", file=sys.stderr, flush=True)
        return ""


def _claim_of(storage: Storage, adapter_name: str, number: int) -> dict[str, Any]:
    try:
        values = json.loads(storage.read_bytes(f"{version_key(adapter_name, number)}/claim.json"))
        return {name: values[name] for name in ("adapter_digest", "files")}
    except (UserError, ValueError, KeyError, TypeError):
        return {}


def _claim(storage: Storage, adapter_name: str, first: int, claim: Mapping[str, Any]) -> int:
    """Take the first number that is free, or that a concurrent upload of the same files has taken.

    Raises:
        UserError: the storage ignores the condition of a write, so nothing in it is safe from another run.
    """
    data = to_json({**claim, "claimed_at": now(), "claimed_by": who()})
    number, taken = first, False
    while True:
        try:
            storage.write_bytes(f"{version_key(adapter_name, number)}/claim.json", data, if_version=ABSENT)
            if taken:
                raise UserError(f"{storage.uri}: the server ignores If-None-Match on PUT, so two runs could overwrite "
                                "each other; use one that honours conditional writes")  # fmt: skip
            taken = True  # the same write again must fail: some S3 servers ignore its condition
        except VersionConflict:
            if taken:
                return number
            if _claim_of(storage, adapter_name, number) == claim:
                return number
            number += 1


def _upload(storage: Storage, adapter_name: str, number: int, folder: Path, record: Mapping[str, Any]) -> None:
    key = version_key(adapter_name, number)
    sent = storage.put_tree(folder, f"{key}/adapter")
    if {f"adapter/{name}": digest for name, digest in sent.items()} != record["files"]:
        raise UserError(f"{folder}: changed while it was registered; let the step that writes it finish")
    data = to_json({"version": number, "adapter_name": adapter_name, **record, "created_at": now()})
    with contextlib.suppress(VersionConflict):  # a concurrent upload of the same files has committed them
        storage.write_bytes(f"{key}/version.json", data, if_version=ABSENT)
