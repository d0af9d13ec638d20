"""Podman on this machine: found or installed, tried, and asked to build and run. `python -m images.podman` tries it."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.exit_codes import exit_code_of
from images.debian import ensure_debian
from tuneloop.errors import UserError

BUILD = Path(__file__).resolve().parent.parent / "build" / "images"
PACKAGES = ("podman", "runc", "containernetworking-plugins", "debootstrap")
_TOOLS = ("podman", "debootstrap")
_LIMITS = BUILD / "containers.conf"

# How a container has to be able to run: no user that means anything outside, nothing to write to but /tmp.
RESTRICTED = ("--user=1000:1000", "--read-only", "--cap-drop=all", "--security-opt=no-new-privileges")


def install() -> None:
    """Install Podman and debootstrap where they are missing and this may be done: on Debian, by root.

    Raises:
        UserError: something is missing.
    """
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise UserError(f"{' and '.join(missing)}: not installed; on Debian: apt-get install {' '.join(PACKAGES)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "--quiet", *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"apt-get {command[0]}: {_last_line(done.stderr)}")


def ready() -> str:
    """A base image with which a container runs here, made if need be.

    Returns:
        Its name.

    Raises:
        UserError: Podman is missing, or no container runs here.
    """
    install()
    base = ensure_debian(podman, BUILD)
    if problem := _trial(base):
        # A container asks for higher limits than a root without CAP_SYS_RESOURCE may give: ask for less.
        _LIMITS.write_text(_limits())
        if _trial(base):
            _LIMITS.unlink()
            raise UserError(f"no container runs here: {problem}")
    return base


def environment() -> dict[str, str]:
    """The environment in which `podman` is to be started here."""
    return {**os.environ, "CONTAINERS_CONF": str(_LIMITS)} if _LIMITS.exists() else dict(os.environ)


def podman(*arguments: str, quiet: bool = True) -> str:
    """Run one Podman command.

    Args:
        quiet: give back what it prints instead of showing it.

    Raises:
        UserError: it failed; the message ends with its own last line.
    """
    pipe = subprocess.PIPE if quiet else None
    done = subprocess.run(["podman", *arguments], stdout=pipe, stderr=pipe, text=True, env=environment())
    if done.returncode:
        if arguments[0] == "run":
            sys.stderr.write((done.stdout or "") + (done.stderr or ""))
        shown = _last_line(done.stderr or done.stdout) if quiet else "see above"
        raise UserError(f"podman {arguments[0]}: exit code {done.returncode}: {shown}")
    return (done.stdout or "").strip()


def inspect(image: str) -> dict[str, Any] | None:
    """What Podman knows of a local image; None: there is none."""
    done = subprocess.run(["podman", "image", "inspect", image], capture_output=True, text=True, env=environment())
    return json.loads(done.stdout)[0] if done.returncode == 0 else None


def run_restricted(image: str, *command: str, options: Sequence[str] = ()) -> str:
    """What a command prints in a container without any right: not root, nothing writable but /tmp, no capability."""
    return podman("run", "--rm", "--network=none", *RESTRICTED, *options, image, *command)


def _trial(base: str) -> str:
    """Why no container runs; empty: one does."""
    command = ["podman", "run", "--rm", "--network=none", *RESTRICTED, base, "true"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    return _last_line(done.stderr) if done.returncode else ""


def _limits() -> str:
    wanted = {"nofile": (resource.RLIMIT_NOFILE, 10_000), "nproc": (resource.RLIMIT_NPROC, 30_000)}
    allowed = {name: (resource.getrlimit(limit)[1], enough) for name, (limit, enough) in wanted.items()}
    given = [f"{name}={(value := min(hard, enough) if hard > 0 else enough)}:{value}"
             for name, (hard, enough) in allowed.items()]  # fmt: skip
    return f"[containers]\ndefault_ulimits = {json.dumps(given)}\n"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it printed nothing"])[-1]


def _try() -> None:
    print(f"containers run here, from {ready()}")


if __name__ == "__main__":
    sys.exit(exit_code_of(_try))
