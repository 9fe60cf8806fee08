"""What ``k8s/`` gives a cluster once: accepted as it stands, and nobody may do more than they need."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kubernetes.cluster.access import Cluster
from tests.kubernetes.overlay import K8S, Namespace, kustomize, of_kind
from tests.kubernetes.rights import RIGHTS, Right

OVERLAYS = ["dev", "prod"]
FEWEST = {"overlays/dev": 20, "overlays/prod": 20, "retrain": 1}
"""Folder of ``k8s/`` → fewer objects than it gives."""
DRY = ("--dry-run=server", "--force-conflicts")


@pytest.fixture(scope="module")
def base(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Namespace]:
    """A namespace with all of ``k8s/base``."""
    namespace = Namespace(cluster)
    objects = namespace.render("base", tmp_path_factory.mktemp("base"))
    with namespace.holding(objects):
        namespace.apply(objects)
        namespace.kubectl("wait", "--for=create", "serviceaccount/default")
        namespace.kubectl("wait", "--for=jsonpath={.status.hard}", "resourcequota/utaforge")
        yield namespace


@pytest.mark.parametrize("folder", FEWEST)
def test_the_api_server_accepts_every_manifest_without_a_warning(folder: str, base: Namespace, tmp_path: Path) -> None:
    objects = base.render(folder, tmp_path)

    said = base.apply(objects, *DRY).splitlines()

    assert len(said) == len(objects) > FEWEST[folder]
    assert all(line.endswith("serverside-applied (server dry run)") for line in said)


def test_a_misspelt_field_is_an_error(base: Namespace, tmp_path: Path) -> None:
    objects = of_kind(base.render("overlays/dev", tmp_path), "Deployment")
    objects[0]["spec"]["template"]["spec"]["容器"] = []

    assert ".spec.template.spec.容器: field not declared in schema" in base.apply(objects, *DRY, check=False)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_namespace_admits_our_pods(overlay: str, base: Namespace, tmp_path: Path) -> None:
    workloads = of_kind(base.render(f"overlays/{overlay}", tmp_path), "Deployment", "StatefulSet")
    assert len(workloads) == 2

    for workload in workloads:
        spec = workload["spec"]["template"]["spec"]
        if "volumeClaimTemplates" in workload["spec"]:
            spec["volumes"].append({"name": "data", "emptyDir": {}})
        assert "created (server dry run)" in _create(base, spec)


def test_the_namespace_refuses_a_pod_that_may_be_root(base: Namespace) -> None:
    said = _create(base, {"containers": [{"name": "root", "image": "debian"}]})

    assert 'violates PodSecurity "restricted:' in said
    assert "runAsNonRoot != true" in said


def test_the_quota_refuses_more_gpus_than_it_has(base: Namespace, tmp_path: Path) -> None:
    spec = of_kind(base.render("overlays/dev", tmp_path), "Deployment")[0]["spec"]["template"]["spec"]
    spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] = 9

    assert "exceeded quota: utaforge, requested: requests.nvidia.com/gpu=9" in _create(base, spec)


def test_the_launcher_may_do_what_stands_in_the_table_and_nothing_else(base: Namespace) -> None:
    assert _rights(base, "utaforge-launcher") - _rights(base, "default") == RIGHTS


def test_the_trainer_may_do_nothing(base: Namespace) -> None:
    assert _rights(base, "utaforge-trainer") == _rights(base, "default")
    assert base.get("serviceaccount", "utaforge-trainer")["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    "forbidden",
    [
        "list secrets",
        "get secrets/mlflow",
        "get secrets/utaforge-store -n kube-system",
        "create pods",
        "list pods -A",
        "delete nodes",
    ],
)
def test_the_launcher_may_not(forbidden: str, base: Namespace) -> None:
    account = f"--as=system:serviceaccount:{base.name}:utaforge-launcher"

    assert base.kubectl("auth", "can-i", *forbidden.split(), account, check=False).splitlines()[-1] == "no"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_image_has_a_version_and_no_secret_is_among_the_manifests(overlay: str) -> None:
    manifest = kustomize(K8S / "overlays" / overlay)

    images = re.findall(r"image: (\S+)", manifest)
    assert len(images) == 2
    assert all(re.search(r":v?\d", image) for image in images)
    assert "kind: Secret" not in manifest


def _create(namespace: Namespace, spec: dict[str, Any]) -> str:
    """What the API server says to a pod, without making it."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "tried"}, "spec": spec}
    return namespace.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod), check=False)


def _rights(namespace: Namespace, account: str) -> set[Right]:
    """The rows of ``kubectl auth can-i --list`` that name resources."""
    table = namespace.kubectl("auth", "can-i", "--list", f"--as=system:serviceaccount:{namespace.name}:{account}")
    rows = re.findall(r"^([a-z]\S*) +\[.*?\] +\[(.*?)\] +\[(.*?)\]$", table, re.MULTILINE)
    return {(resource, name, " ".join(sorted(verbs.split()))) for resource, name, verbs in rows}
