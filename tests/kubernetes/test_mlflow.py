"""MLflow in the cluster: PostgreSQL and S3 behind it, a password before it, and nothing lost with its pod."""

import json
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.kubernetes.cluster.access import Cluster
from tests.kubernetes.cluster.control import DOCKER
from tests.kubernetes.overlay import Namespace, of_kind

IMAGES = Path(__file__).parent / "images"
STAND_INS = {"ghcr.io/mlflow/mlflow": "mlflow", "postgres": "postgresql"}
"""A default image → the Dockerfile of what stands in for it where tests have a registry of their own."""
ADMIN = ("admin", secrets.token_hex(16))
SINGER = ("singer", secrets.token_hex(16))

ASK = """
import base64, json, sys, urllib.error, urllib.request
path, host, user, body = json.loads(sys.argv[1])
headers = {"Host": host, "Content-Type": "application/json"}
if user:
    headers["Authorization"] = "Basic " + base64.b64encode(":".join(user).encode()).decode()
data = json.dumps(body).encode() if body else None
try:
    answer = urllib.request.urlopen(urllib.request.Request("http://mlflow:5000" + path, data, headers))
except urllib.error.HTTPError as error:
    answer = error
print(json.dumps([answer.status, answer.read().decode()]))
"""
LYRICS = "[verse] さくら さくら"
LOG = f"""
import mlflow
mlflow.set_experiment("日本の歌")
with mlflow.start_run(run_name="さくら") as run:
    mlflow.log_metric("validation/loss", 1.25)
    mlflow.log_text("{LYRICS}", "audio/歌詞.txt")
print(run.info.run_id)
"""
READ = """
import json, sys, mlflow
run = mlflow.get_run(sys.argv[1])
text = mlflow.artifacts.load_text(f"runs:/{sys.argv[1]}/audio/歌詞.txt")
print(json.dumps([run.info.run_name, run.data.metrics, text]))
"""


@dataclass(frozen=True)
class Client:
    """A pod that has nothing but MLflow's client."""

    namespace: Namespace

    def python(self, program: str, *arguments: str, user: tuple[str, str] = ("", "")) -> str:
        """The last line that a program prints in it."""
        settings = ["MLFLOW_TRACKING_URI=http://mlflow:5000", "MLFLOW_HTTP_REQUEST_MAX_RETRIES=0"]
        quiet = ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR=false", "GIT_PYTHON_REFRESH=quiet"]
        known = [f"MLFLOW_TRACKING_USERNAME={user[0]}", f"MLFLOW_TRACKING_PASSWORD={user[1]}"]
        command = ["env", *settings, *quiet, *known, "python3", "-c", program, *arguments]
        return self.namespace.kubectl("exec", "client", "--", *command).splitlines()[-1]

    def ask(
        self,
        path: str,
        host: str = "mlflow:5000",
        user: tuple[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> tuple[int, str]:
        """Status and text of one request."""
        status, answer = json.loads(self.python(ASK, json.dumps([path, host, user, body])))
        return status, answer


@pytest.fixture(scope="module")
def images(cluster: Cluster) -> dict[str, str]:
    if "UTAFORGE_TEST_REGISTRY" not in cluster.environment:
        return {}
    return {public: _pushed(cluster, name) for public, name in STAND_INS.items()}


@pytest.fixture(scope="module")
def bucket(cluster: Cluster) -> Iterator[Any]:
    made = boto3.resource(
        "s3",
        endpoint_url=cluster.s3,
        region_name=cluster.environment.get("AWS_REGION", "us-east-1"),
        aws_access_key_id=cluster.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=cluster.environment["AWS_SECRET_ACCESS_KEY"],
    ).Bucket(f"utaforge-test-{secrets.token_hex(4)}")
    made.create()
    yield made
    made.objects.all().delete()
    made.delete()


@pytest.fixture(scope="module")
def client(
    cluster: Cluster, bucket: Any, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """The overlay ``prod`` at work, with secrets made as ``k8s/README.md`` says."""
    namespace = Namespace(cluster)
    settings = {
        "MLFLOW_S3_ENDPOINT_URL": cluster.s3,
        "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{bucket.name}/歌",
        "AWS_DEFAULT_REGION": bucket.meta.client.meta.region_name,
    }
    objects = namespace.render("overlays/prod", tmp_path_factory.mktemp("prod"), images, settings)
    with namespace.holding(objects):
        _secret(namespace, "mlflow-postgresql", password=secrets.token_hex(16))
        _secret(
            namespace,
            "mlflow",
            MLFLOW_FLASK_SERVER_SECRET_KEY=secrets.token_hex(16),
            MLFLOW_AUTH_ADMIN_PASSWORD=ADMIN[1],
            AWS_ACCESS_KEY_ID=cluster.environment["AWS_ACCESS_KEY_ID"],
            AWS_SECRET_ACCESS_KEY=cluster.environment["AWS_SECRET_ACCESS_KEY"],
        )
        namespace.apply(objects)
        image = of_kind(objects, "Deployment")[0]["spec"]["template"]["spec"]["containers"][0]["image"]
        namespace.apply([_client(image)])
        for awaited in ("pod/client", "deployment/mlflow"):
            condition = "Ready" if awaited.startswith("pod") else "Available"
            namespace.kubectl("wait", f"--for=condition={condition}", awaited, "--timeout=290s")
        yield Client(namespace)


@pytest.fixture(scope="module")
def run(client: Client) -> str:
    """A run that a user of their own has logged."""
    person = dict(zip(("username", "password"), SINGER, strict=True))
    status, answer = client.ask("/api/2.0/mlflow/users/create", user=ADMIN, body=person)
    assert status == 200, answer
    return client.python(LOG, user=SINGER)


def test_a_user_logs_a_run_whose_artifacts_lie_in_s3(client: Client, run: str, bucket: Any) -> None:
    assert json.loads(client.python(READ, run, user=SINGER)) == ["さくら", {"validation/loss": 1.25}, LYRICS]

    stored = {one.key: one.get()["Body"].read().decode() for one in bucket.objects.filter(Prefix="歌/")}
    assert [text for key, text in stored.items() if key.endswith(f"/{run}/artifacts/audio/歌詞.txt")] == [LYRICS]


@pytest.mark.parametrize("user", [None, (SINGER[0], "password"), ("admin", "password1234")])
def test_without_the_right_password_nobody_comes_in(client: Client, run: str, user: tuple[str, str] | None) -> None:
    assert client.ask(f"/api/2.0/mlflow/runs/get?run_id={run}", user=user)[0] == 401


def test_a_request_under_a_foreign_name_is_refused(client: Client, run: str) -> None:
    status, answer = client.ask(f"/api/2.0/mlflow/runs/get?run_id={run}", host="xn--r1r.example", user=SINGER)

    assert status == 403
    assert "Invalid Host header" in answer


def test_new_pods_of_mlflow_and_postgresql_know_everything(client: Client, run: str) -> None:
    namespace, selector = client.namespace, "--selector=app.kubernetes.io/name in (mlflow, mlflow-postgresql)"
    before = {pod["metadata"]["uid"] for pod in namespace.get("pods", selector)["items"]}
    namespace.kubectl("delete", "pods", selector)
    for workload in ("statefulset/mlflow-postgresql", "deployment/mlflow"):
        namespace.kubectl("rollout", "status", workload, "--timeout=290s")

    after = {pod["metadata"]["uid"] for pod in namespace.get("pods", selector)["items"]}
    assert len(before) == len(after) == 2
    assert not before & after
    assert json.loads(client.python(READ, run, user=SINGER)) == ["さくら", {"validation/loss": 1.25}, LYRICS]


def _pushed(cluster: Cluster, name: str) -> str:
    image = f"{cluster.registry}/utaforge-test-{name}:latest"
    base = f"BASE={cluster.image}"
    build = [
        "build",
        "--network=host",
        f"--build-arg={base}",
        f"--file={IMAGES / name}.Dockerfile",
        f"--tag={image}",
        str(IMAGES),
    ]
    for command in (build, ["push", image]):
        environment = {**cluster.environment, "DOCKER_BUILDKIT": "1"}
        done = subprocess.run([DOCKER, *command], env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return image


def _secret(namespace: Namespace, name: str, **values: str) -> None:
    literals = [f"--from-literal={key}={value}" for key, value in values.items()]
    namespace.kubectl("create", "secret", "generic", name, *literals)


def _client(image: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "client", "labels": {"app.kubernetes.io/name": "utaforge"}},
        "spec": {
            "serviceAccountName": "utaforge-trainer",
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {
                    "name": "client",
                    "image": image,
                    "command": ["sleep", "infinity"],
                    "env": [{"name": "HOME", "value": "/tmp"}],
                    "resources": {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
                }
            ],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    }
