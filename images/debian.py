"""A Debian with Python 3.11 made on this machine, to build on where no registry can be reached."""

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from tuneloop.errors import UserError

SUITE = "bookworm"  # its Python is 3.11
IMAGE = f"localhost/tuneloop/debian:{SUITE}"
_PACKAGES = "python3,python3-venv,ca-certificates"


def ensure_debian(podman: Callable[..., str], folder: Path) -> str:
    """The image's name, once it is there: bootstrapped in about 40 s, imported, and kept by Podman.

    Args:
        folder: for the root file system while it is made.

    Raises:
        UserError: debootstrap failed, most likely because this is not root or Debian's mirror cannot be reached.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        podman("image", "exists", IMAGE)
        return IMAGE
    except UserError:
        pass
    print(f"bootstrapping Debian {SUITE}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="debian-") as temporary:
        root, log = Path(temporary) / "root", Path(temporary) / "log"
        with log.open("w") as stream:
            command = ["debootstrap", "--variant=minbase", f"--include={_PACKAGES}", SUITE, str(root)]
            done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT)
        if done.returncode:
            raise UserError(f"debootstrap: {(log.read_text().strip().splitlines() or ['failed'])[-1]}")
        for cached in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / cached)
        archive = Path(temporary) / "root.tar"
        subprocess.run(
            ["tar", "--create", "--numeric-owner", f"--directory={root}", f"--file={archive}", "."], check=True
        )
        podman("import", str(archive), IMAGE)
    return IMAGE
