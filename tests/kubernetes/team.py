"""The namespace of a team, made as ``k8s/README.md`` says: ``overlays/prod`` with MLflow at work and all secrets."""

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
from werkzeug.security import generate_password_hash

from tests.kubernetes.cluster.access import Cluster
from tests.kubernetes.overlay import Namespace, Objects, of_kind
from tests.waiting import eventually

ARTIFACTS = "歌"
"""Where MLflow keeps them in the bucket."""
ASK = """
import base64, json, sys, urllib.error, urllib.request
path, host, user, body = json.loads(sys.argv[1])
headers = {"Host": host, "Content-Type": "application/json"}
if user:
    headers["Authorization"] = "Basic " + base64.b64encode(":".join(user).encode()).decode()
data = json.dumps(body).encode() if body else None
try:
    answer = urllib.request.urlopen(urllib.request.Request("http://mlflow:5000" + path, data, headers))
    said = [answer.status, answer.read().decode()]
except urllib.error.HTTPError as error:
    said = [error.status, error.read().decode()]
except OSError:
    said = None
print(json.dumps(said))
"""
User = tuple[str, str]
"""Name and password."""


@dataclass(frozen=True)
class Team:
    """A namespace with everything that people need who submit to it.

    Attributes:
        namespace: where it is.
        bucket: for MLflow's artifacts, and for the team's store.
        store_keys: variables by which the store is reached, as the secret ``utaforge-store`` has them.
        servers: what runs MLflow and PostgreSQL.
        admin: MLflow's administrator.
        trainer: who runs log as, as the secret ``utaforge-mlflow`` has it.
    """

    namespace: Namespace
    bucket: Any
    store_keys: Mapping[str, str]
    servers: Objects
    admin: User = field(default_factory=lambda: ("admin", secrets.token_hex(16)))
    trainer: User = field(default_factory=lambda: ("utaforge", secrets.token_hex(16)))

    def bring_up_mlflow(self) -> None:
        """Once its image can be pulled."""
        (mlflow,) = of_kind(self.servers, "Deployment")
        client = _client(mlflow["spec"]["template"]["spec"]["containers"][0]["image"])
        self.namespace.apply([*self.servers, client])
        for awaited, condition in (("pod/client", "Ready"), ("deployment/mlflow", "Available")):
            self.namespace.kubectl("wait", f"--for=condition={condition}", awaited, "--timeout=290s")
        self.hash_lightly(self.admin)
        self.add_user(self.trainer)

    def quota_is_known(self) -> bool:
        """Whether all is counted that it limits: of RayJobs Kubernetes hears half a minute after their CRD."""
        status = self.namespace.get("resourcequota", "utaforge").get("status", {})
        return "used" in status and status["used"].keys() == status["hard"].keys()

    def python(self, program: str, *arguments: str, user: User = ("", "")) -> str:
        """The last line that a program prints in a pod that has nothing but MLflow's client."""
        settings = ["MLFLOW_TRACKING_URI=http://mlflow:5000", "MLFLOW_HTTP_REQUEST_MAX_RETRIES=0"]
        quiet = ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR=false", "GIT_PYTHON_REFRESH=quiet"]
        known = [f"MLFLOW_TRACKING_USERNAME={user[0]}", f"MLFLOW_TRACKING_PASSWORD={user[1]}"]
        command = ["env", *settings, *quiet, *known, "python3", "-c", program, *arguments]
        return self.namespace.kubectl("exec", "client", "--", *command).splitlines()[-1]

    def ask(
        self,
        path: str,
        host: str = "mlflow:5000",
        user: User | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> tuple[int, str]:
        """Status and text of MLflow's answer to one request; waits where the story has taken MLflow away."""
        status, answer = eventually(lambda: json.loads(self.python(ASK, json.dumps([path, host, user, body]))))
        return status, answer

    def add_user(self, user: User) -> None:
        """Let somebody log to MLflow."""
        person = {"username": user[0], "password": user[1]}
        status, answer = self.ask("/api/2.0/mlflow/users/create", user=self.admin, body=person)
        assert status == 200, answer
        self.hash_lightly(user)

    def hash_lightly(self, user: User) -> None:
        """Let MLflow know the password by a hash that costs less: a request has it computed two to four times."""
        light = generate_password_hash(user[1], "scrypt:1024:8:1")
        change = f"UPDATE users SET password_hash = '{light}' WHERE username = '{user[0]}'"
        database = ("psql", "--username=mlflow", "--dbname=mlflow", f"--command={change}")
        assert "UPDATE 1" in self.namespace.kubectl("exec", "statefulset/mlflow-postgresql", "--", *database)


@contextmanager
def a_team(cluster: Cluster, images: Mapping[str, str], scratch: Path) -> Iterator[Team]:
    """A team in ``cluster``, with a bucket of its own; its MLflow is for the caller to bring up.

    Args:
        cluster: where.
        images: what takes the places of public ones.
        scratch: an empty folder.
    """
    with _bucket(cluster) as bucket:
        namespace = Namespace(cluster)
        region = bucket.meta.client.meta.region_name
        keys = {name: cluster.environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        settings = {
            "MLFLOW_S3_ENDPOINT_URL": cluster.s3,
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{bucket.name}/{ARTIFACTS}",
            "AWS_DEFAULT_REGION": region,
            "MLFLOW_WORKERS": "1",
        }
        objects = namespace.render("overlays/prod", scratch, images, settings)
        servers = of_kind(objects, "Deployment", "StatefulSet")
        store_keys = {**keys, "AWS_REGION": region, "AWS_ENDPOINT_URL": cluster.s3}
        team = Team(namespace, bucket, store_keys, servers)
        with namespace.holding(objects):
            _make_secrets(team, keys)
            namespace.apply([each for each in objects if each not in servers])
            eventually(team.quota_is_known)
            yield team


@contextmanager
def _bucket(cluster: Cluster) -> Iterator[Any]:
    s3: Any = boto3.resource(
        "s3",
        endpoint_url=cluster.s3,
        region_name=cluster.environment.get("AWS_REGION", "us-east-1"),
        aws_access_key_id=cluster.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=cluster.environment["AWS_SECRET_ACCESS_KEY"],
    )
    made = s3.Bucket(f"utaforge-test-{secrets.token_hex(4)}")
    made.create()
    yield made
    made.objects.all().delete()
    made.delete()


def _make_secrets(team: Team, keys: Mapping[str, str]) -> None:
    made = {
        "mlflow-postgresql": {"password": secrets.token_hex(16)},
        "mlflow": {
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            "MLFLOW_AUTH_ADMIN_PASSWORD": team.admin[1],
            **keys,
        },
        "utaforge-mlflow": {"MLFLOW_TRACKING_USERNAME": team.trainer[0], "MLFLOW_TRACKING_PASSWORD": team.trainer[1]},
        "utaforge-store": team.store_keys,
    }
    for name, values in made.items():
        literals = [f"--from-literal={key}={value}" for key, value in values.items()]
        team.namespace.kubectl("create", "secret", "generic", name, *literals)


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
                    "resources": {"requests": {"cpu": "50m", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
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
