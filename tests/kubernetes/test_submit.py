"""``submit`` with the backend ``kubernetes`` on a real cluster, with the rights of the launcher's service account."""

import re
from pathlib import Path

import pytest

from tests.cluster.conftest import Said, Utaforge
from tests.kubernetes.cluster.access import eventually
from tests.kubernetes.place import MOST_SECONDS, STEPS, Place
from tests.kubernetes.proxy import on_a_bad_day
from tests.kubernetes.same import same_bits

pytestmark = pytest.mark.timeout(1800)
NONE_LEFT = ("rayjobs", "rayclusters", "pods", "jobs", "services", "poddisruptionbudgets", "networkpolicies")
"""Kinds of objects that belong to a run."""
GONE_SECONDS = 300.0
"""A pod that waits for its head to come up does not hear that it is to end, and is killed after its two minutes."""


@pytest.fixture(scope="module")
def demo(place: Place) -> Said:
    """The demo, seen through to its end."""
    said = place.submit("demo").end(MOST_SECONDS)
    assert said.code == 0, said.text
    return said


def test_the_demo_ends_on_two_worker_pods_with_adapter_and_songs_in_s3(place: Place, demo: Said) -> None:
    run = place.run("demo")
    assert run.result is not None
    assert run.result["steps"] == STEPS
    assert run.result["loss_after"] < run.result["loss_before"]
    files = {entry.path for entry in run.store.list()}
    assert {"adapter/adapter_model.safetensors", "logs/driver.log", "logs/rank-0.log", "logs/rank-1.log"} <= files
    assert any(path.startswith(f"audio/step-{STEPS:08d}/") for path in files)
    assert "run demo is finished" in demo.text


def test_the_adapter_is_the_one_that_the_local_backend_makes(place: Place, demo: Said) -> None:
    same_bits(place.run("demo"), place.here("demo"))


def test_every_line_of_the_driver_is_told_once(demo: Said) -> None:
    steps = re.findall(rf"^step (\d+)/{STEPS} · loss", demo.text, re.MULTILINE)
    assert [int(step) for step in steps] == list(range(1, STEPS + 1))


def test_what_was_sent_is_gone_but_for_the_rayjob_that_says_how_it_ended(place: Place, demo: Said) -> None:
    (rayjob,) = place.objects("rayjobs", "demo")
    assert (rayjob["status"]["jobDeploymentStatus"], rayjob["status"]["jobStatus"]) == ("Complete", "SUCCEEDED")
    eventually(lambda: not place.pods("demo", "head") and not place.pods("demo", "worker"))
    assert str(place.run("demo").status()) == "finished"


def test_a_fault_of_the_job_ends_it_with_its_first_cluster(place: Place, demo: Said) -> None:
    said = place.submit("nan", "--set", "train.optimizer.lr=1.0e+30", "--set", "train.clip=1.0e+30").end(MOST_SECONDS)
    assert said.code == 6, said.text
    assert "the loss is nan" in said.text
    (rayjob,) = place.objects("rayjobs", "nan")
    assert rayjob["status"].get("failed", 0) == 0
    assert rayjob["status"]["jobStatus"] == "STOPPED"
    assert len(place.objects("rayclusters", "nan")) <= 1
    assert place.run("nan").status().state == "failed"


def test_of_two_terminals_one_submits(place: Place, demo: Said) -> None:
    both = [place.submit("twice") for _ in range(2)]
    eventually(lambda: any("is at work already" in each.text for each in both))
    assert len(place.objects("rayjobs", "twice")) == 1
    at_work = next(each for each in both if "is at work already" not in each.text)
    at_work.until(lambda: "it goes on when this is closed" in at_work.text)
    left = at_work.interrupt()
    assert left.code == 130
    assert "run twice goes on without you" in left.text
    assert len(place.objects("rayjobs", "twice")) == 1
    assert {each.end().code for each in both} == {12, 130}
    place.cancel("twice")
    assert place.objects("rayjobs", "twice") == []
    assert place.run("twice").status().state == "stopped"


@pytest.mark.parametrize(
    ("moment", "accepted"),
    [
        ("plan of", False),
        (": new", None),
        ("it goes on when this is closed", True),
        (": running", True),
        ("step 1/", True),
    ],
)
def test_ctrl_c_leaves_a_run_that_was_accepted_or_nothing(
    place: Place, demo: Said, moment: str, accepted: bool | None, request: pytest.FixtureRequest
) -> None:
    name = f"early-{request.node.callspec.indices['moment']}"
    started = place.submit(name)
    started.until(lambda: moment in started.text)
    said = started.interrupt()
    assert said.code == 130, said.text
    left = "goes on without you" in said.text
    assert accepted in (left, None)
    assert bool(place.objects("rayjobs", name)) == left, said.text
    if left:
        place.cancel(name)


def test_an_account_without_rights_is_told_what_it_lacks_and_sends_nothing(place: Place, tmp_path: Path) -> None:
    place.team.namespace.kubectl("create", "serviceaccount", "nobody")
    said = place.as_account("nobody", tmp_path)("submit", place.job("forbidden"), "--yes")
    assert said.code == 5, said.text
    assert "you may not, in namespace" in said.text
    assert "create rayjobs" in said.text
    assert place.objects("rayjobs", "forbidden") == []


def test_an_api_server_on_a_bad_day_is_asked_again_unseen_and_nothing_is_started_twice(
    place: Place, demo: Said, tmp_path: Path
) -> None:
    with on_a_bad_day(Path(place.utaforge.environment["KUBECONFIG"]), tmp_path) as (proxy, kubeconfig):
        folder = tmp_path / "歌"
        folder.mkdir()
        laptop = Utaforge(folder, {**place.utaforge.environment, "KUBECONFIG": str(kubeconfig)})
        said = laptop("submit", place.job("unlucky"), "--yes")
        assert said.code == 0, said.text
        assert all(count > 3 for count in proxy.spoilt.values())
    steps = re.findall(rf"^step (\d+)/{STEPS} · loss", said.text, re.MULTILINE)
    assert [int(step) for step in steps] == list(range(1, STEPS + 1))
    assert not re.search(r"answered \d|too many requests|timed out|Traceback", said.text)
    assert len(place.objects("rayjobs", "unlucky")) == 1
    assert place.run("unlucky").attempts() == 1


def test_a_run_goes_on_when_the_laptop_is_gone_and_down_leaves_nothing_but_its_directory(
    place: Place, demo: Said
) -> None:
    started = place.submit("alone")
    started.until(lambda: "it goes on when this is closed" in started.text)
    started.kill_everything()
    followed = place.utaforge("logs", "-f", "alone", "--job", place.job("alone"))
    assert f"step {STEPS}/{STEPS} · loss" in followed.text
    eventually(lambda: str(place.run("alone").status()) == "finished")
    said = place.utaforge("down", "alone", "--job", place.job("alone"), "--yes")
    assert said.code == 0, said.text
    for kind in NONE_LEFT:
        eventually(lambda kind=kind: place.objects(kind, "alone") == [], GONE_SECONDS)
    assert place.run("alone").result is not None


def test_a_run_is_cancelled_while_its_pods_come_up(place: Place, demo: Said) -> None:
    started = place.submit("early")
    started.until(lambda: "it goes on when this is closed" in started.text)
    place.cancel("early")
    said = started.end()
    assert said.code == 130, said.text
    assert place.run("early").status().state == "stopped"
    for kind in NONE_LEFT:
        eventually(lambda kind=kind: place.objects(kind, "early") == [], GONE_SECONDS)


def test_secrets_are_nowhere_but_in_their_secrets(place: Place, demo: Said) -> None:
    namespace, bucket = place.team.namespace, place.team.bucket
    kinds = namespace.kubectl("api-resources", "--namespaced", "--verbs=list", "--output=name").split()
    asked = ",".join(kind for kind in kinds if kind != "secrets" and not kind.endswith("metrics.k8s.io"))
    status, tracked = place.team.ask(
        "/api/2.0/mlflow/experiments/search", user=place.team.trainer, body={"max_results": 100}
    )
    assert status == 200
    experiments = re.findall(r'"experiment_id": ?"(\d+)"', tracked)
    runs = place.team.ask("/api/2.0/mlflow/runs/search", user=place.team.trainer, body={"experiment_ids": experiments})[
        1
    ]
    said = {
        "the cluster": namespace.kubectl("get", asked, "--output=yaml", "--show-managed-fields"),
        "the launcher": "".join(log.read_text() for log in place.utaforge.folder.glob("command-*.log")),
        "MLflow": runs,
        **{each.key: each.get()["Body"].read().decode("utf-8", "replace") for each in bucket.objects.all()},
    }
    assert "demo" in said["the cluster"] and "demo" in said["MLflow"] and "step 1/" in said["the launcher"]
    assert any(key.endswith("runs/demo/logs/driver.log") for key in said)
    for secret in (place.canary, place.team.trainer[1], place.team.admin[1]):
        assert [where for where, text in said.items() if secret in text] == []
