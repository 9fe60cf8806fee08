"""``submit`` with the backend ``kubernetes`` on a real cluster, with the rights of the launcher's service account."""

import json
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import Run
from tests.cluster.conftest import Said
from tests.kubernetes.place import LAUNCHER, MOST_SECONDS, STEPS, Place, as_options, changed_checkout, kubeconfig_of
from tests.kubernetes.proxy import BAD_DAY, through_a_proxy
from tests.kubernetes.rights import RIGHTS, rights_used
from tests.kubernetes.same import same_bits
from tests.kubernetes.situations import cause_of, ended_with_its_first_cluster, gpu_nodes
from tests.waiting import eventually

pytestmark = [pytest.mark.timeout(1800), pytest.mark.usefixtures("own_code", "damaged")]
"""What takes long goes on beside all tests."""
ACCEPTED = "it goes on when this is closed"
DAMAGED = "datasets/damaged"
RAISING = {"worker.py": ("self.family = open_family(self.job.model)", 'raise LookupError("歌がない")')}
"""A checkout whose ranks raise an error."""


@pytest.fixture(scope="module")
def own_code(place: Place, opened: None) -> None:
    """A submission of code that raises, from a laptop that is gone once it is accepted."""
    code = changed_checkout(place.utaforge.folder / "raising", RAISING)
    songs = f"data.train=[{{dataset: {place.store}/datasets/own-code}}]"
    started = place.submit("own-code", "cluster.workers=1", f"cluster.code={code}", songs)
    started.until(lambda: ACCEPTED in started.text)
    started.kill_everything()


@pytest.fixture(scope="module")
def demo(place: Place, own_code: None, tmp_path_factory: pytest.TempPathFactory) -> Said:
    """The demo, seen through to its end from a laptop that the API server often answers badly, or not at all."""
    folder = tmp_path_factory.mktemp("laptop")
    with through_a_proxy(kubeconfig_of(place.team, LAUNCHER, folder), folder, BAD_DAY) as (proxy, kubeconfig):
        said = place.elsewhere(kubeconfig, folder).start("submit", place.job("demo"), "--yes").end(MOST_SECONDS)
        assert said.code == 0, said.text
        assert all(count > 3 for count in proxy.spoilt.values())
    return said


@pytest.fixture(scope="module")
def damaged(place: Place, demo: Said) -> None:
    """A submission with songs whose bytes were changed, left while its pods run."""
    for each in place.team.bucket.objects.filter(Prefix="uta/datasets/demo/"):
        content = each.get()["Body"].read()
        copy = each.key.replace("datasets/demo", DAMAGED)
        place.team.bucket.put_object(Key=copy, Body=bytes(len(content)) if copy.endswith(".parquet") else content)
    started = place.submit("damaged", "cluster.workers=1", f"data.train=[{{dataset: {place.store}/{DAMAGED}}}]")
    started.until(lambda: ": running" in started.text)
    assert started.interrupt().code == 130


def test_the_demo_ends_on_two_worker_pods_with_adapter_and_songs_in_s3(place: Place, demo: Said) -> None:
    run = place.run("demo")
    assert run.result is not None
    assert run.result["steps"] == STEPS
    assert run.result["loss_after"] < run.result["loss_before"]
    files = {entry.path for entry in run.store.list()}
    assert {"adapter/adapter_model.safetensors", "logs/driver.log", "logs/rank-0.log", "logs/rank-1.log"} <= files
    assert any(path.startswith(f"audio/step-{STEPS:08d}/") for path in files)
    assert "run demo is finished" in demo.text


def test_every_line_of_the_driver_is_told_once_and_of_bad_answers_nothing(demo: Said) -> None:
    steps = re.findall(rf"^step (\d+)/{STEPS} · loss", demo.text, re.MULTILINE)
    assert [int(step) for step in steps] == list(range(1, STEPS + 1))
    assert not re.search(r"answered \d|too many requests|timed out|Traceback", demo.text)


def test_nothing_was_started_twice(place: Place, demo: Said) -> None:
    assert len(place.objects("rayjobs", "demo")) == 1
    assert place.run("demo").attempts() == 1


def test_what_was_sent_is_gone_but_for_the_rayjob_that_says_how_it_ended(place: Place, demo: Said) -> None:
    (rayjob,) = place.objects("rayjobs", "demo")
    assert (rayjob["status"]["jobDeploymentStatus"], rayjob["status"]["jobStatus"]) == ("Complete", "SUCCEEDED")
    eventually(lambda: not place.pods("demo", "head") and not place.pods("demo", "worker"))
    assert str(place.run("demo").status()) == "finished"


@pytest.mark.parametrize("moment", ["plan of", ": new"])
def test_ctrl_c_before_a_run_is_accepted_leaves_nothing_that_runs(place: Place, moment: str) -> None:
    started = place.submit("hasty")
    started.until(lambda: moment in started.text)
    said = started.interrupt()
    assert said.code == 130, said.text
    left = "goes on without you" in said.text
    assert not left or moment == ": new"
    assert bool(place.objects("rayjobs", "hasty")) == left, said.text
    if left:
        place.cancel("hasty")


def test_of_two_terminals_one_submits_and_what_it_leaves_is_cancelled_while_pods_come_up(place: Place) -> None:
    both = [place.submit("twice") for _ in range(2)]
    eventually(lambda: any("is at work already" in each.text for each in both))
    at_work = next(each for each in both if "is at work already" not in each.text)
    at_work.until(lambda: ACCEPTED in at_work.text)
    assert len(place.objects("rayjobs", "twice")) == 1
    left = at_work.interrupt()
    assert left.code == 130
    assert "run twice goes on without you" in left.text
    assert {each.end().code for each in both} == {12, 130}
    assert len(place.objects("rayjobs", "twice")) == 1
    followed = place.follow("twice")
    followed.until(lambda: "head " in followed.text)
    place.cancel("twice")
    assert followed.end().code == 0
    assert place.objects("rayjobs", "twice") == []
    assert place.run("twice").status().state == "stopped"


def test_an_error_of_peoples_own_code_ends_a_run_with_its_first_cluster_though_the_laptop_is_gone(place: Place) -> None:
    assert "LookupError: 歌がない" in place.follow("own-code").end(MOST_SECONDS).text
    assert place.run("own-code").status().state == "failed"
    assert "worker.py" in cause_of(place.run("own-code"), "LookupError: 歌がない").evidence
    ended_with_its_first_cluster(place, "own-code")


def test_a_damaged_shard_ends_a_run_that_was_left_while_its_pods_ran(place: Place) -> None:
    assert "damaged" in cause_of(place.run("damaged"), "damaged", MOST_SECONDS).what
    assert place.run("damaged").status().state == "failed"
    ended_with_its_first_cluster(place, "damaged")


def test_the_adapter_is_the_one_that_the_local_backend_makes(place: Place, demo: Said, here: Future[Run]) -> None:
    same_bits(place.run("demo"), here.result())


def test_an_account_without_rights_is_told_what_it_lacks_and_sends_nothing(place: Place, tmp_path: Path) -> None:
    place.team.namespace.kubectl("create", "serviceaccount", "nobody")
    nobody = place.elsewhere(kubeconfig_of(place.team, "nobody", tmp_path), tmp_path)
    said = nobody("submit", place.job("forbidden"), "--yes")
    assert said.code == 5, said.text
    assert "you may not, in namespace" in said.text
    assert "create rayjobs" in said.text
    assert place.objects("rayjobs", "forbidden") == []


def test_all_that_is_wrong_is_told_at_once_each_with_its_cure(place: Place, tmp_path: Path) -> None:
    wrong = {
        "cluster.image": f"{place.cluster.registry}/utaforge-trainer:gone",
        "cluster.secrets": "[utaforge-store, uta-no]",
        "cluster.service_account": "uta-nobody",
        "cluster.profile": "elsewhere",
        "cluster.queue": "{kind: kueue, name: uta}",
    }
    (place.utaforge.folder / "profiles" / "elsewhere.yaml").write_text(gpu_nodes("{nvidia.com/gpu.product: Uta}"))
    administrator = place.elsewhere(place.cluster.kubeconfig, tmp_path)
    said = administrator(
        "submit", place.job("wrong"), "--yes", *as_options(f"{key}={value}" for key, value in wrong.items())
    )
    assert said.code == 5, said.text
    assert "5 things stand in the way of wrong" in said.text
    for told in ("has no ", "no secret uta-no", "no uta-nobody", "the labels that profile elsewhere", "no kueue queue"):
        assert told in said.text, said.text
    assert said.text.count("→") == len(wrong), said.text
    assert place.objects("rayjobs", "wrong") == []


def test_a_run_on_the_cluster_is_listed_with_its_state_its_log_and_nothing_to_explain(place: Place, demo: Said) -> None:
    listed = json.loads(place.utaforge.output("list", "--store", place.store, "--json"))
    assert {run["state"] for run in listed if run["name"] == "demo"} == {"finished"}
    assert f"step {STEPS}/{STEPS}" in place.utaforge.output("logs", "demo", "--store", place.store)
    for command in ("status", "why"):
        assert "finished" in place.utaforge.output(command, "demo", "--store", place.store)


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
        "the launcher": demo.text + "".join(log.read_text() for log in place.utaforge.folder.glob("command-*.log")),
        "MLflow": runs,
        **{each.key: _content(each) for each in bucket.objects.all()},
    }
    assert "demo" in said["the cluster"] and "demo" in said["MLflow"] and "step 1/" in said["the launcher"]
    assert any(key.endswith("runs/demo/logs/driver.log") for key in said)
    for secret in (place.canary, place.team.trainer[1], place.team.admin[1]):
        assert [where for where, text in said.items() if secret in text] == []


def test_the_launcher_uses_all_of_its_rights_and_asks_for_no_others(
    place: Place, demo: Said, songbloom: Future[tuple[Said, Said]]
) -> None:
    songbloom.result()
    assert rights_used(place.proxy.asked) == RIGHTS


def _content(stored: Any) -> str:
    """Of an object in S3; nothing of a checkpoint that has made room for a newer one meanwhile."""
    try:
        return stored.get()["Body"].read().decode("utf-8", "replace")
    except stored.meta.client.exceptions.NoSuchKey:
        return ""
