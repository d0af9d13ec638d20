"""What is asked of Podman: pip as on this machine, limits that may be given; one line where something is missing."""

import configparser
import json
import os
import resource

import pytest

from images import build, podman
from tuneloop.errors import UserError


def test_pip_in_the_build_is_set_up_as_here(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for folder in ("wheels", "index/simple", "build"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ca.crt").write_text("certificates")
    (tmp_path / "pip.conf").write_text(
        f"[global]\nfind-links = {tmp_path}/wheels\nextra-index-url =\n    file://{tmp_path}/index/simple\n"
        f"    https://pypi.example/simple\ncert = {tmp_path}/ca.crt\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_TIMEOUT", "77")

    options = build._pip_like_here(tmp_path / "build")
    places = (f"{tmp_path}/wheels", f"{tmp_path}/index", f"{tmp_path}/ca.crt")
    wanted = {f"--volume={place}:{place}:ro" for place in places}
    assert {*wanted, f"--volume={tmp_path}/build/pip.conf:/etc/pip.conf:ro"} <= set(options)
    assert not [option for option in options if "pypi.example" in option]
    written = configparser.RawConfigParser()
    written.read(tmp_path / "build" / "pip.conf")
    assert written["global"]["extra-index-url"].split() == [
        f"file://{tmp_path}/index/simple", "https://pypi.example/simple",
    ]  # fmt: skip
    assert written["global"]["timeout"] == "77"
    assert "config-file" not in written["global"]


def test_limits_are_no_higher_than_ours():
    [line] = [line for line in podman._limits().splitlines() if line.startswith("default_ulimits")]
    limits = dict(limit.split("=") for limit in json.loads(line.split(" = ")[1]))
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert limits["nofile"] == "{0}:{0}".format(min(ours, 10_000) if ours > 0 else 10_000)
    assert set(limits) == {"nofile", "nproc"}


def test_what_is_missing_is_named_to_who_may_not_install_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)  # root would have it installed here
    with pytest.raises(UserError, match=r"^podman and debootstrap: not installed; on Debian: apt-get install podman "):
        podman.install()


@pytest.mark.parametrize("arguments", [["--flavour", "rocm"], ["--only", "serve"]])
def test_what_cannot_be_built_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        build.main(arguments)
    assert left.value.code == UserError.exit_code
    assert "invalid choice" in capsys.readouterr().err
