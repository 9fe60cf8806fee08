"""The cluster of the tests is a real one, comes back when its programs die, and leaves nothing."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import psutil
import pytest
from botocore.config import Config

from tests.cluster.conftest import Utaforge
from tests.kubernetes.cluster.access import RAY_CRD, Cluster
from tests.kubernetes.cluster.control import down, environment, status, up
from tests.kubernetes.cluster.gpus import GPU, NODES, gpus_on_the_node, simulated_nodes
from tests.kubernetes.cluster.layout import Layout
from tests.waiting import eventually


@pytest.fixture(scope="module")
def shell(cluster: Cluster, namespace: str) -> str:
    """A pod with bash that waits for commands."""
    cluster.apply(pod("shell", namespace, cluster.image, "echo 歌が聞こえる; sleep infinity"))
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/shell", "--timeout=120s")
    return "shell"


def pod(name: str, namespace: str, image: str, script: str, **spec: Any) -> dict[str, Any]:
    limits = spec.pop("limits", {})
    container = {"name": "main", "image": image, "command": ["bash", "-c", script], "resources": {"limits": limits}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [container], **spec},
    }


def always_pulled(manifest: dict[str, Any]) -> dict[str, Any]:
    manifest["spec"]["containers"][0]["imagePullPolicy"] = "Always"
    return manifest


def ray_job(namespace: str, **spec: Any) -> dict[str, Any]:
    container = {"name": "ray", "image": "ray"}
    group = {"rayStartParams": {}, "template": {"spec": {"containers": [container]}}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "sakura", "namespace": namespace, "annotations": {"title": "さくら"}},
        "spec": {"entrypoint": "python -V", "rayClusterSpec": {"headGroupSpec": group}, **spec},
    }


def test_its_node_is_ready(cluster: Cluster) -> None:
    conditions = [c for node in cluster.get("nodes")["items"] for c in node["status"]["conditions"]]
    assert {"type": "Ready", "status": "True"}.items() <= next(c for c in conditions if c["type"] == "Ready").items()


def test_what_a_pod_prints_is_its_log(cluster: Cluster, namespace: str, shell: str) -> None:
    assert eventually(lambda: cluster.kubectl("logs", "-n", namespace, shell)) == "歌が聞こえる\n"


def test_commands_run_in_a_pod(cluster: Cluster, namespace: str, shell: str) -> None:
    assert cluster.kubectl("exec", "-n", namespace, shell, "--", "echo", "さくら") == "さくら\n"


def test_a_pod_finds_services_by_name(cluster: Cluster, namespace: str, shell: str) -> None:
    address = cluster.get("service", "kubernetes", "-n", "default")["spec"]["clusterIP"]
    found = cluster.kubectl("exec", "-n", namespace, shell, "--", "getent", "hosts", "kubernetes.default")
    assert found.split()[0] == address


def test_pods_reach_each_other_through_a_service(cluster: Cluster, namespace: str, shell: str) -> None:
    answer = pod("answer", namespace, cluster.image, f"exec perl -e '{ANSWERING_SERVER}'")
    answer["metadata"]["labels"] = {"app": "answer"}
    service = {"selector": {"app": "answer"}, "ports": [{"port": 80, "targetPort": 8000}]}
    cluster.apply(answer, {"apiVersion": "v1", "kind": "Service", "metadata": answer["metadata"], "spec": service})
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod/answer", "--timeout=60s")
    ask = ["exec", "-n", namespace, shell, "--", "bash", "-c", "cat < /dev/tcp/answer/80"]
    assert eventually(lambda: "うたう" in cluster.kubectl(*ask, check=False))


ANSWERING_SERVER = """use IO::Socket::INET;
my $server = IO::Socket::INET->new(LocalPort => 8000, Listen => 5, ReuseAddr => 1);
while (my $client = $server->accept) { print $client "うたう\\n"; close $client }"""


def test_kuberay_accepts_a_rayjob_and_refuses_unknown_fields(cluster: Cluster, namespace: str) -> None:
    create = ["create", "--dry-run=server", "-f", "-"]
    said = cluster.kubectl(*create, stdin=json.dumps(ray_job(namespace)))
    assert said == "rayjob.ray.io/sakura created (server dry run)\n"
    wrong = json.dumps(ray_job(namespace, うた="さくら"))
    assert 'unknown field "spec.うた"' in cluster.kubectl(*create, stdin=wrong, check=False)


def test_the_operator_watches_rayjobs(cluster: Cluster, namespace: str) -> None:
    cluster.apply(ray_job(namespace, ttlSecondsAfterFinished=9))
    job = ["get", "rayjob", "sakura", "-n", namespace, "-o", "jsonpath={.status.jobDeploymentStatus}"]
    assert eventually(lambda: cluster.kubectl(*job)) == "ValidationFailed"


def test_a_pod_puts_and_gets_objects_of_the_s3_server(cluster: Cluster, namespace: str, shell: str) -> None:
    client = boto3.client(
        "s3",
        endpoint_url=cluster.s3,
        region_name="us-east-1",
        aws_access_key_id=cluster.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=cluster.environment["AWS_SECRET_ACCESS_KEY"],
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    client.create_bucket(Bucket=namespace)
    place = {"Bucket": namespace, "Key": "歌/さくら.txt"}

    def ask(action: str, headers: str = "", body: str = "") -> str:
        url = urlsplit(client.generate_presigned_url(f"{action.lower()}_object", place))
        head = f"{action} {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\nConnection: close\r\n{headers}\r\n"
        script = f"exec 3<>/dev/tcp/{url.hostname}/{url.port}; cat >&3; cat <&3"
        return cluster.kubectl("exec", "-i", "-n", namespace, shell, "--", "bash", "-c", script, stdin=head + body)

    assert "200 OK" in ask("PUT", "Content-Length: 9\r\n", "さくら")
    assert client.get_object(**place)["Body"].read().decode() == "さくら"
    assert ask("GET").endswith("さくら")


def test_an_image_that_nobody_has_is_a_real_pull_error(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("lost", namespace, f"{cluster.registry}/nobody:1", "true"))
    reason = [
        "get",
        "pod",
        "lost",
        "-n",
        namespace,
        "-o",
        "jsonpath={.status.containerStatuses[0].state.waiting.reason}",
    ]
    assert eventually(lambda: cluster.kubectl(*reason) in ("ErrImagePull", "ImagePullBackOff"))


def test_a_built_image_is_pushed_and_runs(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    name = f"{cluster.registry}/{namespace}:1"
    (tmp_path / "Dockerfile").write_text('FROM debian:bookworm-slim\nRUN echo 桜 > /歌\nCMD ["cat", "/歌"]\n')
    for command in (["build", "--network", "host", "-t", name, tmp_path], ["push", name]):
        subprocess.run(["docker", *command], env=dict(cluster.environment), check=True, capture_output=True)
    cluster.kubectl("run", "built", "-n", namespace, f"--image={name}", "--restart=Never")
    assert eventually(lambda: cluster.kubectl("logs", "built", "-n", namespace, check=False) == "桜\n")


def test_a_private_image_needs_the_pull_secret(own_cluster: Cluster, namespace: str) -> None:
    server = own_cluster.environment["UTAFORGE_TEST_PRIVATE_REGISTRY"]
    image = f"{server}/debian:bookworm-slim"
    own_cluster.apply(always_pulled(pod("refused", namespace, image, "true")))
    eventually(lambda: "401 Unauthorized" in own_cluster.kubectl("get", "events", "-n", namespace))
    user = f"--docker-username={own_cluster.environment['UTAFORGE_TEST_REGISTRY_USER']}"
    password = f"--docker-password={own_cluster.environment['UTAFORGE_TEST_REGISTRY_PASSWORD']}"
    secret = ["docker-registry", "pull", "-n", namespace, f"--docker-server={server}", user, password]
    own_cluster.kubectl("create", "secret", *secret)
    allowed = pod("allowed", namespace, image, "true", imagePullSecrets=[{"name": "pull"}])
    own_cluster.apply(always_pulled(allowed))
    phase = ["get", "pod", "allowed", "-n", namespace, "-o", "jsonpath={.status.phase}"]
    assert eventually(lambda: own_cluster.kubectl(*phase) == "Succeeded")


def test_a_claim_gets_a_volume_that_its_group_may_write(cluster: Cluster, namespace: str) -> None:
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    meta = {"name": "songs", "namespace": namespace}
    cluster.apply({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": claim})
    volume = {"name": "songs", "persistentVolumeClaim": {"claimName": "songs"}}
    writer = pod("writer", namespace, cluster.image, "echo さくら > /songs/歌 && cat /songs/歌", volumes=[volume])
    writer["spec"]["securityContext"] = {"runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000}
    writer["spec"]["containers"][0]["volumeMounts"] = [{"name": "songs", "mountPath": "/songs"}]
    cluster.apply(writer)
    assert eventually(lambda: cluster.kubectl("logs", "writer", "-n", namespace, check=False) == "さくら\n")


def test_a_pod_with_gpus_waits_until_the_node_has_them(own_cluster: Cluster, namespace: str) -> None:
    own_cluster.apply(pod("gpus", namespace, own_cluster.image, "true", limits={GPU: "4"}))
    phase = ["get", "pod", "gpus", "-n", namespace, "-o", "jsonpath={.status.phase}"]
    eventually(lambda: "Insufficient nvidia.com/gpu" in own_cluster.kubectl("get", "events", "-n", namespace))
    assert own_cluster.kubectl(*phase) == "Pending"
    with gpus_on_the_node(own_cluster, 4):
        assert eventually(lambda: own_cluster.kubectl(*phase) == "Succeeded")


def test_pods_go_to_simulated_nodes_by_their_labels(own_cluster: Cluster, namespace: str) -> None:
    with simulated_nodes(own_cluster):
        for name, (gpus, _, labels) in NODES.items():
            spec = {
                "nodeSelector": labels,
                "tolerations": [{"key": key, "operator": "Exists"} for key in {GPU, *labels}],
            }
            own_cluster.apply(pod(name, namespace, "train", "true", limits={GPU: str(gpus)}, **spec))
        for name in NODES:
            where = ["get", "pod", name, "-n", namespace, "-o", "jsonpath={.spec.nodeName}"]
            assert eventually(lambda where=where: own_cluster.kubectl(*where)) == name


@pytest.fixture(scope="module")
def second(cluster: Cluster) -> Iterator[Layout]:
    """A cluster that tests may end, beside the one that all share."""
    if not cluster.own:
        pytest.skip("only for the tests' own cluster")
    with tempfile.TemporaryDirectory(prefix="uta-", dir="/tmp") as folder:
        layout = Layout(Path(folder))
        try:
            yield layout
        finally:
            down(layout)


def traces(layout: Layout) -> dict[str, Any]:
    """What a cluster may leave on this machine."""
    groups = [path for hierarchy in Path("/sys/fs/cgroup").iterdir() for path in hierarchy.glob(f"{layout.name}*")]
    kernel = [Path("/proc/sys", name).read_text() for name in ("vm/overcommit_memory", "kernel/panic")]
    rules = [subprocess.run([program], capture_output=True, check=True).stdout for program in SAVED_RULES]
    return {
        "processes": [p.pid for p in psutil.process_iter() if belongs(p, layout)],
        "mounts": [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(layout.folder) in line],
        "device": Path("/sys/class/net", layout.device).exists(),
        "rules": [line for text in rules for line in text.decode().splitlines() if line.startswith("-A")],
        "control groups": groups,
        "kernel": kernel,
        "home": sorted(path for path in Path.home().glob(".kube/**/*") if str(layout.node) in str(path)),
    }


JOB = """\
name: sakura
store: s3://uta/store
model: {{family: musicgen, pretrained: "random:tiny"}}
method: {{type: lora}}
data: {{train: [{{dataset: s3://uta/歌}}]}}
train: {{steps: 1, batch: {{seconds: 60}}}}
cluster: {{backend: kubernetes, profile: cpu, workers: 1, namespace: default, image: "{image}"}}
"""


def check_without_kuberay(layout: Layout, folder: Path) -> None:
    """What ``submit`` says where KubeRay is too old for a field, is not there at all, or nobody knows who asks."""
    cluster = Cluster(os.environ | environment(layout), own=True)
    path = folder / "job.yaml"
    path.write_text(JOB.format(image=cluster.image), encoding="utf-8")

    def submit(kubeconfig: str = cluster.kubeconfig) -> str:
        laptop = Utaforge(Path(tempfile.mkdtemp(dir=folder)), {**environment(layout), "KUBECONFIG": kubeconfig})
        said = laptop("submit", str(path), "--yes")
        assert said.code == 5, said.text
        return said.text

    versions = [each["name"] for each in cluster.get("crd", RAY_CRD)["spec"]["versions"]]
    schema = f"/spec/versions/{versions.index('v1')}/schema/openAPIV3Schema"
    field = f"{schema}/properties/spec/properties/preRunningDeadlineSeconds"
    old = json.dumps([{"op": "remove", "path": field}])
    cluster.kubectl("patch", "crd", RAY_CRD, "--type=json", "-p", old)
    eventually(lambda: "the cluster's KubeRay is too old" in submit())
    cluster.kubectl("delete", "crd", RAY_CRD)
    assert "the cluster lacks KubeRay" in submit()
    config = json.loads(cluster.kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    config["users"][0]["user"] = {"token": "期限切れ".encode().hex()}
    expired = folder / "expired.kubeconfig"
    expired.write_text(json.dumps(config))
    assert "your credentials have expired or are wrong" in submit(str(expired))


SAVED_RULES = ("iptables-save", "ip6tables-save")


def belongs(process: psutil.Process, layout: Layout) -> bool:
    try:
        return (
            str(layout.folder) in " ".join(process.cmdline())
            or layout.name in Path(f"/proc/{process.pid}/cgroup").read_text()
        )
    except (psutil.Error, OSError):
        return False


def test_up_starts_what_died_and_down_leaves_nothing(second: Layout, tmp_path: Path) -> None:
    before = traces(second)
    up(second, print)
    check_without_kuberay(second, tmp_path)
    whole = Cluster(os.environ | environment(second), own=True)
    whole.apply(pod("song", "default", whole.image, "echo さくら; sleep infinity"))
    whole.kubectl("wait", "--for=condition=Ready", "pod/song", "--timeout=120s")
    pids = status(second)
    assert all(state.startswith("well") for state in pids.values()), pids
    killed = psutil.Process(int(pids["kube-scheduler"].rpartition(" ")[2]))
    killed.kill()
    eventually(lambda: status(second)["kube-scheduler"] == "not running")
    up(second, print)
    again = status(second)
    assert {name for name in pids if pids[name] != again[name]} == {"kube-scheduler"}
    assert again["kube-scheduler"].startswith("well")
    assert traces(second) != before
    down(second)
    assert traces(second) == before
    assert status(second) == {"cluster": "down"}
