"""Which nodes the pods of each profile go to, among simulated ones of every kind."""

from collections.abc import Iterator

import pytest

from launcher.runs import Run
from tests.kubernetes.cluster.access import Cluster
from tests.kubernetes.cluster.gpus import NODES, simulated_nodes
from tests.kubernetes.place import Place
from tests.kubernetes.situations import Situations, cause_of, gpu_nodes
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(600)
WHERE = {
    "t4x4": ("gke-t4x4", 4, False),
    "t4x4-spot": ("gke-t4x4-spot", 4, True),
    "a100": ("gke-a100-80", 1, False),
    "a100-40-spot": ("eks-a100-40-spot", 1, True),
    "rtx4090": ("onprem-rtx4090", 1, False),
}
"""Profile, and whether on spot nodes → the only node that its workers may go to, and their number."""


@pytest.fixture(scope="module")
def nodes(cluster: Cluster) -> Iterator[None]:
    if not cluster.own:
        pytest.skip("simulated nodes are only for the tests' own cluster")
    with simulated_nodes(cluster, plain=True):
        yield


@pytest.fixture(scope="module")
def situations(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Situations:
    return Situations(tmp_path_factory.mktemp("jobs"), place.store, place.namespace, place.image)


@pytest.mark.parametrize("kind", WHERE)
def test_the_workers_of_a_profile_go_to_its_nodes_and_nothing_else_does(
    place: Place, nodes: None, situations: Situations, kind: str
) -> None:
    node, workers, spot = WHERE[kind]
    profile = f"cluster.profile={kind.removesuffix('-spot')}"
    where = (profile, f"cluster.workers={workers}", f"cluster.spot={spot}".lower())
    with situations.sent(f"on-{kind}", *where) as run:
        assert eventually(lambda: _nodes(place, run, "worker")) == {node}
        assert not eventually(lambda: _nodes(place, run, "head")) & NODES.keys()


def test_without_gpus_no_pod_goes_where_gpus_are(place: Place, nodes: None, situations: Situations) -> None:
    with situations.sent("on-cpu", "cluster.profile=cpu", "cluster.workers=2") as run:
        for kind in ("head", "worker"):
            assert not eventually(lambda kind=kind: _nodes(place, run, kind)) & NODES.keys()


def test_a_taint_that_nobody_tolerates_is_told(nodes: None, situations: Situations) -> None:
    situations.profile("tainted", gpu_nodes("{cloud.google.com/gke-accelerator: nvidia-tesla-t4}"))
    with situations.sent("taint", "cluster.profile=tainted") as run:
        assert "tolerations" in cause_of(run, "taints that it does not tolerate").cure


def test_a_job_too_large_is_told_before_anything_is_sent(place: Place, nodes: None) -> None:
    said = place.submit("large", "cluster.profile=t4x4", "cluster.workers=8").end()
    assert said.code == 5, said.text
    assert "the 1 nodes fit for it have room for 1 of 2 workers with " in said.text
    assert place.objects("rayjobs", "large") == []


def _nodes(place: Place, run: Run, node_type: str) -> set[str]:
    found = place.team.namespace.get("pods", "-l", f"utaforge/run={run.name},ray.io/node-type={node_type}")["items"]
    return {pod["spec"]["nodeName"] for pod in found if "nodeName" in pod["spec"]}
