"""``make up``: a workstation's MLflow, PostgreSQL and S3 server, by Docker's compose plug-in."""

import secrets
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import boto3
import mlflow
import pytest
import requests
from mlflow.artifacts import load_text

from tests.kubernetes.cluster.access import Cluster
from tests.kubernetes.cluster.install import programs
from tests.kubernetes.images import ROOT, Images

pytestmark = pytest.mark.timeout(1800)


class Services:
    """``make up`` and ``make down`` in a clone of the last commit, under a project name and on ports of its own."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        self.folder = folder
        self.mlflow_port, self.s3_port = _free_port(), _free_port()
        self.environment = {
            **environment,
            "COMPOSE_PROJECT_NAME": f"utaforge-test-{secrets.token_hex(4)}",
            "MLFLOW_PORT": str(self.mlflow_port),
            "S3_PORT": str(self.s3_port),
        }
        self.run("git", "clone", "--quiet", ROOT, folder)

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    def make(self, target: str) -> None:
        self.run("make", "--directory", self.folder, target)

    def variables(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in (self.folder / "docker/.env").read_text().split())

    def run(self, *command: str | Path) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=1200, check=False)
        assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def services(
    cluster: Cluster, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Services]:
    environment = dict(cluster.environment)
    compose = subprocess.run(["docker", "compose", "version"], env=environment, capture_output=True, check=False)
    if compose.returncode != 0:
        assert not cluster.own, compose.stderr
        pytest.skip("Docker has no compose plug-in here")
    if cluster.own:
        environment |= _stand_ins(request.getfixturevalue("images"))
    found = Services(environment, tmp_path_factory.mktemp("services") / "utaforge")
    try:
        found.make("up")
        yield found
    finally:
        found.run("docker", "compose", "--file", found.folder / "docker/compose.yaml", "down", "--volumes")


def test_runs_and_their_artifacts_outlive_the_services(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", services.mlflow)
    for name, value in services.variables().items():
        monkeypatch.setenv(name, value)
    mlflow.set_experiment("さくら")
    with mlflow.start_run() as run:
        mlflow.log_metric("loss", 0.5)
        mlflow.log_text("桜の歌", "歌詞.txt")
    services.make("down")
    services.make("up")
    assert mlflow.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    assert load_text(f"runs:/{run.info.run_id}/歌詞.txt") == "桜の歌"


def test_the_store_has_its_buckets_and_wants_the_keys_of_env(services: Services) -> None:
    keys = services.variables()
    s3 = boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{services.s3_port}",
        region_name="us-east-1",
        aws_access_key_id=keys["S3_ACCESS_KEY"],
        aws_secret_access_key=keys["S3_SECRET_KEY"],
    )
    assert [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]] == ["mlflow", "music"]
    s3.put_object(Bucket="music", Key="歌.txt", Body="さくら".encode())
    assert s3.get_object(Bucket="music", Key="歌.txt")["Body"].read().decode() == "さくら"
    assert requests.get(f"http://127.0.0.1:{services.s3_port}/music/", timeout=10).status_code == 403
    assert (services.folder / "docker/.env").stat().st_mode & 0o777 == 0o600


def test_other_hosts_names_are_refused(services: Services) -> None:
    url = f"{services.mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert requests.get(url, timeout=10).status_code == 200
    assert requests.get(url, headers={"Host": "uta.example"}, timeout=10).status_code == 403


def _stand_ins(images: Images) -> dict[str, str]:
    """Variables that name images made here, where the public ones cannot be pulled."""
    (versitygw,) = programs(["versitygw"], print)
    return {
        "MLFLOW_IMAGE": images.stand_ins["ghcr.io/mlflow/mlflow"],
        "POSTGRES_IMAGE": images.stand_ins["postgres"],
        "S3_IMAGE": images.stand_in("versitygw", versitygw.parent),
    }


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
