"""The cluster that all tests here use: one of their own, or with ``KUBECONFIG`` set, somebody's."""

import os
import secrets
from collections.abc import Iterator

import pytest

from tests.kubernetes.cluster.access import RAY_CRD, Cluster
from tests.kubernetes.cluster.control import environment, up
from tests.kubernetes.cluster.install import obstacles
from tests.kubernetes.cluster.layout import Layout


@pytest.fixture(scope="session")
def cluster() -> Cluster:
    layout = Layout.of_environment()
    if os.environ.get("KUBECONFIG", str(layout.kubeconfig)) != str(layout.kubeconfig):
        found = Cluster(os.environ, own=False)
        if RAY_CRD not in found.kubectl("get", "crd", "-o", "name"):
            pytest.skip("the cluster of KUBECONFIG has no KubeRay")
        return found
    if reasons := obstacles():
        because = f"no cluster can be brought up here: {'; '.join(reasons)}"
        pytest.fail(because) if os.environ.get("CI") else pytest.skip(because)
    up(layout, print)
    return Cluster(os.environ | environment(layout), own=True)


@pytest.fixture
def own_cluster(cluster: Cluster) -> Cluster:
    if not cluster.own:
        pytest.skip("this changes nodes or programs: only for the tests' own cluster")
    return cluster


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh one for each module of tests."""
    name = f"utaforge-test-{secrets.token_hex(4)}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")
