"""``submit`` with the backend ``kubernetes`` on a real cluster: KubeRay, S3, two worker pods, what may go wrong.

The trainer image of the cluster's registry is used, with this checkout's trainer laid over it (``cluster.code``).
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from launcher.backends.registry import look
from launcher.runs import Run, find_run
from tests.cluster.conftest import Said, Started, Utaforge
from tests.kubernetes.cluster.access import Cluster, eventually

ROOT = Path(__file__).parents[2]
BUCKET = "utaforge-submit"
pytestmark = pytest.mark.timeout(1800)
STEPS, COMMIT_EVERY = 30, 5
JOB = """\
name: {name}
store: s3://{bucket}/{store}
model: {{family: musicgen, pretrained: "builtin:pocket", segment_seconds: 10}}
method: {{type: lora, rank: 8, targets: [q_proj, v_proj]}}
data:
  train: [{{dataset: s3://{bucket}/{store}/datasets/demo}}]
  validation: {{fraction: 0.25, by: song}}
  prepare: {{source: {{type: demo, style: b, songs: 8}}}}
train: {{steps: {steps}, batch: {{seconds: 40}}, optimizer: {{lr: 1.0e-2}}}}
checkpoint: {{every: {every}}}
validation:
  every: {steps}
  prompts: [{{tags: "元気な 祭り, 都節音階", seconds: 2, seed: 1}}]
cluster:
  backend: kubernetes
  profile: small
  workers: 2
  namespace: {namespace}
  image: {image}
  code: {root}
  secrets: [utaforge-store]
"""
LONG = ("--set", "train.steps=150", "--set", "validation.every=150")
"""Enough steps for something to happen meanwhile."""
MOST_SECONDS = 1500
"""Of one run: images are pulled, and a cluster may be lost."""
SMALL = "cores: 0.2\nram_gib: 2.5\ndisk_gib: 4\n"


class Place:
    """A namespace to submit to, as a team would have one, and the command that does it."""

    def __init__(self, cluster: Cluster, namespace: str, folder: Path) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.image = f"{cluster.registry}/utaforge-trainer:dev"
        self.store = namespace
        if look(self.image) != "there":
            pytest.skip(f"push the trainer's image: make image REGISTRY={cluster.registry} TAG=dev PUSH=1")
        wanted = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
        self.s3 = {name: cluster.environment[name] for name in wanted if name in cluster.environment}
        self.s3 |= {"AWS_ENDPOINT_URL": cluster.s3}
        for name, value in self.s3.items():
            os.environ[name] = value  # for this process's own look into the store
        (folder / "profiles").mkdir()
        (folder / "profiles" / "small.yaml").write_text(SMALL)
        self.utaforge = Utaforge(folder, {**self.s3, "KUBECONFIG": cluster.kubeconfig, "PYTHONPATH": str(ROOT)})

    def job(self, name: str) -> str:
        """A job file of that name."""
        text = JOB.format(
            name=name,
            bucket=BUCKET,
            store=self.store,
            steps=STEPS,
            every=COMMIT_EVERY,
            namespace=self.namespace,
            image=self.image,
            root=ROOT,
        )
        path = self.utaforge.folder / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def submit(self, name: str, *more: str) -> Started:
        return self.utaforge.start("submit", self.job(name), "--yes", *more)

    def run(self, name: str) -> Run:
        return find_run(f"s3://{BUCKET}/{self.store}", name)

    def committed(self, name: str) -> int:
        """Step of the newest checkpoint; 0 where there is no run yet."""
        place = f"s3://{BUCKET}/{self.store}"
        return find_run(place, name).newest_commit() if self.objects("rayjobs", name) else 0

    def objects(self, kind: str, run: str) -> list[dict[str, Any]]:
        found = self.cluster.get("-n", self.namespace, kind, "-l", f"utaforge/run={run}")
        return found["items"]

    def pods(self, run: str, node_type: str) -> list[str]:
        found = self.cluster.get("-n", self.namespace, "pods", "-l", f"utaforge/run={run},ray.io/node-type={node_type}")
        return [pod["metadata"]["name"] for pod in found["items"] if not pod["metadata"].get("deletionTimestamp")]

    def take_away(self, pod: str) -> None:
        """As a node does that goes without notice: whoever is given 100 seconds may be done before they are over."""
        self.cluster.kubectl("-n", self.namespace, "delete", "pod", pod, "--grace-period=1", "--wait=false")


@pytest.fixture(scope="module")
def place(cluster: Cluster, namespace: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(cluster, namespace, tmp_path_factory.mktemp("uta"))
    kubectl = cluster.kubectl
    kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    kubectl("-n", namespace, "create", "serviceaccount", "utaforge-trainer")
    keys = [f"--from-literal={name}={value}" for name, value in made.s3.items()]
    kubectl("-n", namespace, "create", "secret", "generic", "utaforge-store", *keys)
    client = boto3.client("s3", endpoint_url=cluster.s3)
    if BUCKET not in {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=BUCKET)
    yield made
    kubectl("-n", namespace, "delete", "rayjobs", "--all", "--wait=false")
    made.utaforge.end_everything()


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


def test_every_line_of_the_driver_is_told_once(demo: Said) -> None:
    steps = re.findall(rf"^step (\d+)/{STEPS} · loss", demo.text, re.MULTILINE)
    assert [int(step) for step in steps] == list(range(1, STEPS + 1))


def test_what_was_sent_is_gone_but_for_the_rayjob_that_says_how_it_ended(place: Place, demo: Said) -> None:
    (rayjob,) = place.objects("rayjobs", "demo")
    assert (rayjob["status"]["jobDeploymentStatus"], rayjob["status"]["jobStatus"]) == ("Complete", "SUCCEEDED")
    eventually(lambda: not place.pods("demo", "head") and not place.pods("demo", "worker"))
    assert str(place.run("demo").status()) == "finished"


def test_a_worker_pod_that_is_taken_away_is_replaced_and_the_run_ends_well(place: Place, demo: Said) -> None:
    started = place.submit("worker", *LONG)
    started.until(lambda: place.committed("worker"))
    taken = place.pods("worker", "worker")[0]
    place.take_away(taken)
    said = started.end(MOST_SECONDS)
    assert said.code == 0, said.text
    assert "going on from step" in said.text
    assert place.run("worker").attempts() == 1
    assert place.objects("rayjobs", "worker")[0]["status"].get("failed", 0) == 0


def test_a_head_that_is_taken_away_costs_one_cluster_and_no_step(place: Place, demo: Said) -> None:
    started = place.submit("head", *LONG)
    started.until(lambda: place.committed("head"))
    (head,) = place.pods("head", "head")
    place.take_away(head)
    said = started.end(MOST_SECONDS)
    assert said.code == 0, said.text
    assert "cluster 1 of at most 3 was lost" in said.text
    assert "going on from step" in said.text
    assert place.objects("rayjobs", "head")[0]["status"]["failed"] == 1


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
    assert {each.end().code for each in both} == {5, 130}
    done = place.utaforge("cancel", "twice", "--job", place.job("twice"))
    assert done.code == 0, done.text
    assert place.objects("rayjobs", "twice") == []
    assert place.run("twice").status().state == "stopped"


@pytest.mark.parametrize(
    ("moment", "accepted"),
    [("plan of", False), (": new", None), ("it goes on when this is closed", True), (": running", True)],
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
    assert not left or place.utaforge("cancel", name, "--job", place.job(name)).code == 0


def test_an_account_without_rights_is_told_what_it_lacks_and_sends_nothing(
    place: Place, demo: Said, tmp_path: Path
) -> None:
    kubectl = place.cluster.kubectl
    kubectl("-n", place.namespace, "create", "serviceaccount", "nobody")
    token = kubectl("-n", place.namespace, "create", "token", "nobody").strip()
    config = json.loads(kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    config["users"][0]["user"] = {"token": token}
    path = tmp_path / "kubeconfig"
    path.write_text(json.dumps(config))
    folder = tmp_path / "歌"
    folder.mkdir()
    nobody = Utaforge(folder, {**place.utaforge.environment, "KUBECONFIG": str(path)})
    said = nobody("submit", place.job("forbidden"), "--yes")
    assert said.code == 5, said.text
    assert "you may not, in namespace" in said.text
    assert "create rayjobs" in said.text
    assert place.objects("rayjobs", "forbidden") == []
