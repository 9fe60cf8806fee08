"""MLflow in the cluster: PostgreSQL and S3 behind it, a password before it, and nothing lost with its pod."""

import json
import secrets

import pytest

from tests.kubernetes.team import ARTIFACTS, Team

SINGER = ("singer", secrets.token_hex(16))
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


@pytest.fixture(scope="module")
def run(team: Team, opened: None) -> str:
    """A run that a user of their own has logged."""
    team.add_user(SINGER)
    return team.python(LOG, user=SINGER)


def test_a_user_logs_a_run_whose_artifacts_lie_in_s3(team: Team, run: str) -> None:
    assert json.loads(team.python(READ, run, user=SINGER)) == ["さくら", {"validation/loss": 1.25}, LYRICS]

    found = team.bucket.objects.filter(Prefix=f"{ARTIFACTS}/")
    stored = {
        one.key: one.get()["Body"].read() for one in found if one.key.endswith(f"/{run}/artifacts/audio/歌詞.txt")
    }
    assert [text.decode() for text in stored.values()] == [LYRICS]


@pytest.mark.parametrize("user", [None, (SINGER[0], "password"), ("admin", "password1234")])
def test_without_the_right_password_nobody_comes_in(team: Team, run: str, user: tuple[str, str] | None) -> None:
    assert team.ask(f"/api/2.0/mlflow/runs/get?run_id={run}", user=user)[0] == 401


def test_a_request_under_a_foreign_name_is_refused(team: Team, run: str) -> None:
    status, answer = team.ask(f"/api/2.0/mlflow/runs/get?run_id={run}", host="xn--r1r.example", user=SINGER)

    assert status == 403
    assert "Invalid Host header" in answer


def test_new_pods_of_mlflow_and_postgresql_know_everything(team: Team, run: str) -> None:
    namespace, selector = team.namespace, "--selector=app.kubernetes.io/name in (mlflow, mlflow-postgresql)"
    before = {pod["metadata"]["uid"] for pod in namespace.get("pods", selector)["items"]}
    namespace.kubectl("delete", "pods", selector)
    for workload in ("statefulset/mlflow-postgresql", "deployment/mlflow"):
        namespace.kubectl("rollout", "status", workload, "--timeout=290s")

    after = {pod["metadata"]["uid"] for pod in namespace.get("pods", selector)["items"]}
    assert len(before) == len(after) == 2
    assert not before & after
    assert json.loads(team.python(READ, run, user=SINGER)) == ["さくら", {"validation/loss": 1.25}, LYRICS]
