"""``why`` on a real cluster: each thing that keeps a run from going well is made to happen."""

import json
import os
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import boto3
import pytest

from launcher.down import remains, take_down
from launcher.runs import Run
from launcher.snapshot import gather
from launcher.why import Cause, diagnose
from tests.kubernetes.cluster.access import Cluster, eventually
from tests.kubernetes.cluster.gpus import gpus_on_the_node, simulated_nodes
from tests.kubernetes.images import Images
from tests.kubernetes.situations import Situations

pytestmark = pytest.mark.timeout(1800)
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION")
SHORT, LONG = 120.0, 900.0
"""Seconds that something takes before training, and with it."""
GPU_NODES = """\
gpu: T4
gpus: 1
gpu_gib: 14.6
tflops: 65
cores: 0.05
ram_gib: 2.5
disk_gib: 4
nodes:
  - labels: {LABELS}
"""


@pytest.fixture(scope="module")
def store(cluster: Cluster) -> Iterator[str]:
    """The URL of a store of these tests' own, which this process reaches too."""
    before = {key: os.environ.get(key) for key in KEYS}
    os.environ |= {key: cluster.environment[key] for key in KEYS[:2]}
    os.environ |= {"AWS_ENDPOINT_URL": cluster.s3, "AWS_REGION": "us-east-1"}
    bucket = f"utaforge-why-{uuid4().hex[:8]}"
    boto3.client("s3", endpoint_url=cluster.s3).create_bucket(Bucket=bucket)
    yield f"s3://{bucket}/歌"
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


@pytest.fixture(scope="module")
def situations(
    cluster: Cluster, namespace: str, store: str, images: Images, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Situations]:
    os.environ["KUBECONFIG"] = cluster.kubeconfig
    cluster.kubectl("-n", namespace, "create", "serviceaccount", "utaforge-trainer")
    _secret(cluster, namespace, "utaforge-store", {key: os.environ[key] for key in KEYS})
    yield Situations(tmp_path_factory.mktemp("jobs"), store, namespace, images.name("trainer"))


@pytest.fixture
def why(situations: Situations) -> Iterator[Callable[..., Cause]]:
    """Sends a run and waits until the likeliest cause says ``expected``; takes the run down afterwards."""
    sent: list[Run] = []

    def ask(expected: str, name: str, *overrides: str, seconds: float = SHORT) -> Cause:
        run = situations.send(name, *overrides)
        sent.append(run)
        return cause_of(run, expected, seconds)

    yield ask
    take_down(remains(sent), print)
    assert remains(sent) == []


def cause_of(run: Run, expected: str, seconds: float = SHORT) -> Cause:
    def found() -> Cause | None:
        return next((cause for cause in diagnose(gather(run))[:1] if expected in cause.what), None)

    cause = eventually(found, seconds)
    assert cause is not None
    return cause


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
    situations.profile("elsewhere", GPU_NODES.replace("LABELS", "nvidia.com/gpu.product: 歌".replace("歌", "Uta")))
    assert "labels" in why("no node has the labels", "no-gpu", "cluster.profile=elsewhere").cure


def test_a_taint(why: Callable[..., Cause], situations: Situations, own_cluster: Cluster) -> None:
    situations.profile("tainted", GPU_NODES.replace("LABELS", "cloud.google.com/gke-accelerator: nvidia-tesla-t4"))
    with simulated_nodes(own_cluster):
        assert "tolerations" in why("taints that it does not tolerate", "taint", "cluster.profile=tainted").cure


def test_gpus_that_others_use(why: Callable[..., Cause], situations: Situations, own_cluster: Cluster) -> None:
    situations.profile(
        "every", GPU_NODES.replace("{LABELS}", "{kubernetes.io/os: linux}").replace("gpus: 1", "gpus: 4")
    )
    with gpus_on_the_node(own_cluster, 2):
        assert "nvidia.com/gpu" in why("no node has enough free GPUs", "busy", "cluster.profile=every").evidence


def test_a_loss_that_is_no_number(why: Callable[..., Cause], situations: Situations) -> None:
    cause = why("the loss is", "nan", "train.optimizer.lr=1e30", seconds=LONG)
    assert "train.optimizer.lr" in cause.cure


def test_keys_that_the_store_refuses(why: Callable[..., Cause], cluster: Cluster, namespace: str) -> None:
    _secret(cluster, namespace, "wrong", {**{key: os.environ[key] for key in KEYS}, "AWS_SECRET_ACCESS_KEY": "違う"})
    overrides = ("cluster.secrets=[wrong]", "cluster.attempts=1")
    assert "cluster.secrets" in why("the store refuses the run", "denied", *overrides, seconds=LONG).cure


def test_a_worker_and_then_the_head_that_are_taken_away(
    situations: Situations, cluster: Cluster, namespace: str
) -> None:
    run = situations.send("taken", "train.steps=100000", "train.log_every=1", "validation.every=100000")
    eventually(lambda: run.status().step > 20, LONG)
    _delete(cluster, namespace, "worker", "taken")
    assert "-worker-" in cause_of(run, "a worker was taken away").evidence
    _delete(cluster, namespace, "head", "taken")
    assert "KubeRay makes the next one" in cause_of(run, "clusters were lost", LONG).cure
    take_down(remains([run]), print)
    assert diagnose(gather(run))[0].what == "somebody has stopped it"


def test_a_shard_whose_bytes_were_changed(why: Callable[..., Cause], situations: Situations, cluster: Cluster) -> None:
    run = situations.send("whole", "train.steps=1", "validation.every=1", "checkpoint.every=1")
    eventually(lambda: run.finished, LONG)
    bucket, _, prefix = run.job.data.train[0].dataset.removeprefix("s3://").partition("/")
    client: Any = boto3.client("s3", endpoint_url=cluster.s3)
    for each in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]:
        if each["Key"].endswith(".parquet"):
            client.put_object(Bucket=bucket, Key=each["Key"], Body=bytes(each["Size"]))
    assert "damaged" in why("damaged", "corrupt", seconds=LONG).what


def _delete(cluster: Cluster, namespace: str, kind: str, run: str) -> None:
    selector = f"ray.io/node-type={kind},utaforge/run={run}"
    cluster.kubectl("-n", namespace, "delete", "pod", "-l", selector, "--wait=false")


def _secret(cluster: Cluster, namespace: str, name: str, values: dict[str, str]) -> None:
    cluster.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace},
            "stringData": json.loads(json.dumps(values)),
        }
    )
