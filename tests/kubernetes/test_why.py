"""``why`` on a real cluster: each thing that keeps a run from training is made to happen.

What ends one that trains is asked after where it happens: people's own code and a damaged shard in ``test_submit``, a
NaN in ``test_retraining``, pods that are taken away in ``test_story``.
"""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import boto3
import pytest

from launcher.render.rayjob import SUBMISSION
from launcher.runs import Run
from launcher.why import Cause
from tests.kubernetes.cluster.access import Cluster
from tests.kubernetes.cluster.gpus import gpus_on_the_node
from tests.kubernetes.images import Images
from tests.kubernetes.situations import Situations, cause_of, gpu_nodes
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(1800)
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION")
SECONDS = 600.0
QUEUED = "cluster.queue={kind: kueue, name: uta}"
"""KubeRay makes no pods of a suspended RayJob, whether or not there is a Kueue that lets it go."""


@pytest.fixture(scope="module")
def store(cluster: Cluster) -> Iterator[str]:
    """The URL of a store of these tests' own, which this process reaches too."""
    bucket = f"utaforge-why-{uuid4().hex[:8]}"
    with pytest.MonkeyPatch.context() as patch:
        for key in (*KEYS[:2], "KUBECONFIG"):
            patch.setenv(key, cluster.environment[key])
        patch.setenv("AWS_ENDPOINT_URL", cluster.s3)
        patch.setenv("AWS_REGION", "us-east-1")
        boto3.client("s3", endpoint_url=cluster.s3).create_bucket(Bucket=bucket)
        yield f"s3://{bucket}/歌"


@pytest.fixture(scope="module")
def situations(
    cluster: Cluster, namespace: str, store: str, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Situations:
    cluster.kubectl("-n", namespace, "create", "serviceaccount", "utaforge-trainer")
    _secret(cluster, namespace, "utaforge-store", {key: os.environ[key] for key in KEYS})
    return Situations(tmp_path_factory.mktemp("jobs"), store, namespace, images.name("trainer"))


@pytest.fixture
def why(situations: Situations) -> Callable[..., Cause]:
    """Sends a run, and gives the likeliest cause once that says ``expected``."""

    def ask(expected: str, name: str, *overrides: str) -> Cause:
        with situations.sent(name, *overrides) as run:
            return cause_of(run, expected, SECONDS)

    return ask


def test_an_image_that_does_not_exist(why: Callable[..., Cause], cluster: Cluster) -> None:
    cause = why("there is no image", "no-image", f"cluster.image={cluster.registry}/utaforge-trainer:gone")
    assert "not found" in cause.evidence and "make image" in cause.cure


def test_a_registry_that_wants_a_login(why: Callable[..., Cause], cluster: Cluster) -> None:
    private = cluster.environment.get("UTAFORGE_TEST_PRIVATE_REGISTRY")
    if not private:
        pytest.skip("set UTAFORGE_TEST_PRIVATE_REGISTRY to a registry that wants a login")
    cause = why("the registry does not give", "closed", f"cluster.image={private}/utaforge-trainer:{uuid4().hex}")
    assert "cluster.pull_secrets" in cause.cure


def test_a_secret_that_is_not_there(why: Callable[..., Cause]) -> None:
    assert (
        "uta-no" in why("there is no secret uta-no", "no-secret", "cluster.secrets=[utaforge-store, uta-no]").evidence
    )


def test_a_service_account_that_is_not_there(why: Callable[..., Cause]) -> None:
    cause = why("there is no service account uta-nobody", "no-account", "cluster.service_account=uta-nobody")
    assert "cluster.service_account" in cause.cure


def test_a_quota_that_is_too_small(why: Callable[..., Cause], cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("-n", namespace, "create", "quota", "uta-small", "--hard=requests.memory=3Gi")
    try:
        assert "3Gi" in why("ResourceQuota uta-small leaves no room", "quota").evidence
    finally:
        cluster.kubectl("-n", namespace, "delete", "quota", "uta-small")


def test_a_machine_that_the_cluster_does_not_have(why: Callable[..., Cause], situations: Situations) -> None:
    situations.profile("elsewhere", gpu_nodes("{nvidia.com/gpu.product: Uta}"))
    assert "labels" in why("no node has the labels", "no-gpu", "cluster.profile=elsewhere").cure


def test_gpus_that_others_use(why: Callable[..., Cause], situations: Situations, own_cluster: Cluster) -> None:
    situations.profile("every", gpu_nodes("{kubernetes.io/os: linux}", gpus=4))
    four = ("cluster.profile=every", "cluster.workers=4")
    with gpus_on_the_node(own_cluster, 2):
        assert "nvidia.com/gpu" in why("no node has enough free GPUs", "busy", *four).evidence


def test_keys_that_the_store_refuses_which_no_second_cluster_cures(
    situations: Situations, cluster: Cluster, namespace: str
) -> None:
    _secret(cluster, namespace, "wrong", {**{key: os.environ[key] for key in KEYS}, "AWS_SECRET_ACCESS_KEY": "違う"})
    with situations.sent("denied", "cluster.secrets=[wrong]") as run:
        assert "cluster.secrets" in cause_of(run, "the store refuses the run", SECONDS).cure
        rayjob = ["get", "rayjobs", "-n", namespace, "-l", "utaforge/run=denied", "-o"]
        eventually(lambda: cluster.kubectl(*rayjob, "jsonpath={.items[0].status.jobStatus}") == "STOPPED")
        assert cluster.kubectl(*rayjob, "jsonpath={.items[0].status.failed}") in ("", "0")


def test_a_queue_that_does_not_let_it_in(why: Callable[..., Cause]) -> None:
    assert "localqueue" in why("it waits in the queue uta", "queued", QUEUED).cure


def test_a_budget_of_hours_that_is_over(why: Callable[..., Cause]) -> None:
    assert "raise budget.hours" in why("the budget's hours are over", "over", "budget.hours=0.0005").cure


def test_a_pod_that_takes_more_memory_than_it_has(
    situations: Situations, cluster: Cluster, namespace: str, images: Images
) -> None:
    with situations.sent("memory", QUEUED) as run:
        cluster.apply(_stray(run, namespace, images, "songs = ['さくら' * (1 << 20) for _ in range(1 << 20)]"))
        cause = cause_of(run, "the worker ran out of memory", SECONDS)
        assert "OOMKilled" in cause.evidence and "ram_gib" in cause.cure


def test_a_pod_that_takes_more_shared_memory_than_it_has(
    situations: Situations, cluster: Cluster, namespace: str, images: Images
) -> None:
    write = (
        "import mmap; f = open('/dev/shm/歌', 'w+b'); f.truncate(1 << 24); mmap.mmap(f.fileno(), 0)[:] = bytes(1 << 24)"
    )
    with situations.sent("shared-memory", QUEUED) as run:
        cluster.apply(_stray(run, namespace, images, write))
        assert "(SIGBUS)" in cause_of(run, "the worker ran out of shared memory", SECONDS).evidence


def _stray(run: Run, namespace: str, images: Images, program: str) -> dict[str, Any]:
    """A pod that looks like a worker of ``run``, which waits in a queue, and does something else."""
    attempt = run.newest_attempt()
    assert attempt
    container = {
        "name": "ray-worker",
        "image": images.name("trainer"),
        "command": ["python", "-c", program],
        "resources": {"limits": {"memory": "64Mi"}},
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": f"stray-{run.name}",
            "namespace": namespace,
            "labels": {"ray.io/node-type": "worker", SUBMISSION: attempt.submission},
        },
        "spec": {
            "restartPolicy": "Never",
            "containers": [container],
            "volumes": [{"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}],
        },
    }


def _secret(cluster: Cluster, namespace: str, name: str, values: dict[str, str]) -> None:
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace},
            "stringData": json.loads(json.dumps(values)),
        }
    )
