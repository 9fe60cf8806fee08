"""The images as ``make image`` builds them, run as a cluster runs them: as nobody special, with nothing to write to."""

import json

import pytest

from tests.kubernetes.cluster.access import Cluster
from tests.kubernetes.images import ROOT, Images

MEGABYTE = 1_000_000
PUBLIC_BASE = 75 * MEGABYTE
"""Of debian:bookworm-slim; what stands in for it where nothing can be pulled is larger."""


both = pytest.mark.parametrize("image", ["trainer", "launcher"])
pytestmark = pytest.mark.timeout(3600)


@both
def test_labels_name_the_commit_and_the_licence(images: Images, image: str) -> None:
    labels = images.inspect(image)["Config"]["Labels"]
    said = {name.removeprefix("org.opencontainers.image."): value for name, value in labels.items()}
    assert said["revision"] == images.commit
    assert said["version"] == "test"
    assert said["title"] == f"utaforge-{image}"
    assert said["licenses"] == "Apache-2.0"
    assert said["source"] == "https://example.org/歌"
    assert said["created"].startswith("20")


@both
def test_they_run_as_nobody_special(images: Images, image: str) -> None:
    assert images.inspect(image)["Config"]["User"] == "1000:1000"
    assert images.inside(image, "id", "--user") == "1000\n"


def test_deepspeed_communicates_on_cpus_without_a_compiler(images: Images) -> None:
    assert images.found("trainer", "g++", "gcc", "cc", "c++") == set()
    built = images.inside("trainer", "python", "-m", "trainer.engine", "--warm")
    assert "deepspeed_shm_comm_op built successfully" in built
    again = "python -m trainer.engine --warm > /dev/null; find /tmp -name '*.so'"
    assert images.inside("trainer", "sh", "-c", again) == ""


def test_imports_find_bytecode(images: Images) -> None:
    script = (
        "import os, torch, ray, trainer.engine as e; print(*(os.path.exists(m.__cached__) for m in (torch, ray, e)))"
    )
    assert images.inside("trainer", "python", "-c", script) == "True True True\n"


def test_the_trainer_has_what_kuberays_probes_and_submitter_call(images: Images) -> None:
    assert images.found("trainer", "bash", "wget", "grep", "ray") == {"bash", "wget", "grep", "ray"}


def test_the_launcher_is_small_and_has_no_torch(images: Images, cluster: Cluster) -> None:
    size = images.inspect("launcher")["Size"]
    if cluster.own:
        base = json.loads(images.run("docker", "image", "inspect", cluster.image))[0]["Size"]
        size += PUBLIC_BASE - base
    assert size <= 300 * MEGABYTE
    script = "import importlib.util; print(importlib.util.find_spec('torch'))"
    assert images.inside("launcher", "python", "-c", script) == "None\n"
    assert "submit" in images.inside("launcher", "utaforge", "--help")


def test_the_launcher_plans_a_job_and_knows_kubernetes(images: Images) -> None:
    job = (ROOT / "jobs/demo.yaml").read_text()
    assert "歌" in job
    said = images.inside("launcher", "sh", "-c", "cat > /tmp/demo.yaml && utaforge plan /tmp/demo.yaml", stdin=job)
    assert "demo" in said
    script = "from kubernetes import client, config, watch; print('歌')"
    assert images.inside("launcher", "python", "-c", script) == "歌\n"


@both
def test_the_bill_of_materials_names_python_and_debian_packages(images: Images, image: str) -> None:
    bill = json.loads((images.folder / f".utaforge/images/utaforge-{image}.cdx.json").read_text())
    purls = [component.get("purl", "") for component in bill["components"]]
    assert any(purl.startswith("pkg:deb/debian/libc6@") for purl in purls)
    assert any(purl.startswith("pkg:pypi/obstore@") for purl in purls)
    assert any(purl.startswith("pkg:pypi/torch@2.11.0") for purl in purls) == (image == "trainer")


def test_a_code_change_changes_the_last_layer_alone(images: Images) -> None:
    with (images.folder / "trainer/loop.py").open("a") as file:
        file.write("\n# 歌\n")
    images.build("changed")
    for image in ("trainer", "launcher"):
        *before, code = images.inspect(image)["RootFS"]["Layers"]
        *after, changed = images.inspect(image, "changed")["RootFS"]["Layers"]
        assert before == after
        assert code != changed
