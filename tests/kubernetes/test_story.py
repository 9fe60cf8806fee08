"""One run, and all that may happen to it on a cluster: at its end it is the run to which nothing happened."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from launcher.runs import Run, runs_of
from tests.kubernetes.cluster.access import eventually
from tests.kubernetes.cluster.control import kill, up
from tests.kubernetes.cluster.layout import Layout
from tests.kubernetes.images import Images
from tests.kubernetes.place import LONG, MOST_SECONDS, SLOW, STORY, Place, changed_checkout
from tests.kubernetes.same import same_bits
from tests.kubernetes.situations import cause_of

pytestmark = pytest.mark.timeout(3600)
EAT = """
import glob, os, pathlib, time
for _ in range(3):
    os.fork()
songs = []
while any("ray::RayTrain" in pathlib.Path(name).read_text() for name in glob.glob("/proc/[0-9]*/comm")):
    songs.append(b"u" * (8 << 20))
    time.sleep(0.2)
"""
"""Eight processes that slowly take all memory of a pod until its rank is gone: Ray has marked that to go first."""
STOP = """
import glob, os, pathlib, signal
for name in glob.glob("/proc/[0-9]*/comm"):
    if "ray::RayTrain" in pathlib.Path(name).read_text():
        os.kill(int(name.split("/")[2]), signal.SIGSTOP)
"""
"""Stops the ranks of a pod where they are, and so all others, which wait for them."""
OUTAGE_SECONDS = 30.0
HANG_SECONDS = 15.0
"""Of silence that ``why`` takes for a hang here."""
NONE_LEFT = ("rayjobs", "rayclusters", "pods", "jobs", "services", "poddisruptionbudgets", "networkpolicies")
"""Kinds of objects that belong to a run."""
GONE_SECONDS = 300.0
"""A worker's pod that does not reach its head does not hear that it is to end, and is killed after its two minutes."""


class Story:
    """The run while it is followed from a laptop."""

    def __init__(self, place: Place) -> None:
        self.place = place
        slow = changed_checkout(place.utaforge.folder / "slow", SLOW)
        self.submission = place.submit(STORY, *LONG, f"cluster.code={slow}")
        self.learns()

    @property
    def resumed(self) -> int:
        """How often ranks have gone on from a checkpoint."""
        return self.submission.text.count("going on from step ")

    def learns(self) -> None:
        """Wait until there is a checkpoint that was not there before."""
        before = self.place.committed(STORY)
        self.submission.until(lambda: self.place.committed(STORY) > before)

    def goes_on(self, before: int) -> None:
        """Wait until ranks have gone on once more than ``before``, and have learnt something."""
        self.submission.until(lambda: self.resumed > before)
        self.learns()


@contextmanager
def without(*programs: str) -> Iterator[None]:
    """``kill -9`` of some of the cluster's programs; afterwards they are started again."""
    layout = Layout.of_environment()
    for program in programs:
        kill(layout, program)
    try:
        yield
    finally:
        up(layout, print)


@pytest.fixture(scope="module")
def told(place: Place, images: Images, whole: Future[Run]) -> Story:
    return Story(place)


@pytest.fixture(scope="module")
def story(place: Place, told: Story, whole: Future[Run]) -> str:
    """What the launcher said until the end."""
    namespace = place.team.namespace

    namespace.kubectl("scale", "deployment/mlflow", "--replicas=0")
    before = told.resumed
    place.take_away(place.pods(STORY, "worker")[0])
    assert "-worker-" in cause_of(place.run(STORY), "a worker was taken away", among=None).evidence
    told.goes_on(before)
    namespace.kubectl("scale", "deployment/mlflow", "--replicas=1")

    before = told.resumed
    namespace.kubectl("exec", place.pods(STORY, "worker")[0], "--", "python", "-c", EAT, check=False)
    assert "ram_gib" in cause_of(place.run(STORY), "ran out of memory", among=None).cure
    told.goes_on(before)

    namespace.kubectl("exec", place.pods(STORY, "worker")[0], "--", "python", "-c", STOP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.why.QUIET_SECONDS", HANG_SECONDS)
        assert "rank-" in cause_of(place.run(STORY), "it hangs", among=None).evidence

    before = told.resumed  # of ranks that are not stopped some would end the run before they miss their head
    place.take_away(place.pods(STORY, "head")[0])
    assert "KubeRay makes the next one" in cause_of(place.run(STORY), "clusters were lost", among=None).cure
    told.goes_on(before)

    with without("ray-operator", "kube-apiserver", "versitygw"):
        time.sleep(OUTAGE_SECONDS)

    said = told.submission.end(MOST_SECONDS)
    assert said.code == 0, said.text
    return said.text


def test_it_ends_as_the_run_to_which_nothing_happened(place: Place, story: str, whole: Future[Run]) -> None:
    same_bits(place.run(STORY), whole.result())


def test_one_cluster_was_lost_with_its_head_and_none_besides(place: Place, story: str) -> None:
    assert story.count("cluster 1 of at most 3 was lost") == 1
    (rayjob,) = place.objects("rayjobs", STORY)
    assert rayjob["status"]["failed"] == 1
    assert place.run(STORY).attempts() == 1


def test_each_loss_is_told_by_what_it_was(story: str) -> None:
    assert "a rank was lost: its machine or pod ran out of memory\n" in story
    assert "the server cannot be reached" in story
    assert "Traceback" not in story
    assert "autoscaler" not in story


def test_mlflow_has_one_run_with_every_step_once(place: Place, story: str) -> None:
    steps_taken = place.run(STORY).job.train.steps
    tracked = json.loads(place.run(STORY).store.get("mlflow.json"))["run_id"]
    place.team.namespace.kubectl("wait", "--for=condition=Available", "deployment/mlflow", "--timeout=290s")
    eventually(lambda: _tracked(place, tracked)["status"] == "FINISHED")
    history = f"metrics/get-history?run_id={tracked}&metric_key=train/loss&max_results=1000"
    steps = [int(point.get("step", 0)) for point in _ask(place, history)["metrics"]]
    assert sorted(steps) == list(range(1, steps_taken + 1))
    experiment = _tracked(place, tracked)["experiment_id"]
    called_so = {"experiment_ids": [experiment], "filter": f"attributes.run_name = '{STORY}'"}
    assert [run["info"]["run_id"] for run in _ask(place, "runs/search", called_so)["runs"]] == [tracked]


def test_down_leaves_nothing_but_the_run_directories(place: Place, story: str) -> None:
    runs = runs_of(place.store).folders()
    assert STORY in runs
    said = place.utaforge("down", "--all", "--store", place.store, "--yes")
    assert said.code == 0, said.text
    for kind in NONE_LEFT:
        eventually(lambda kind=kind: place.objects(kind) == [], GONE_SECONDS)
    assert runs_of(place.store).folders() == runs


def _tracked(place: Place, run_id: str) -> Any:
    return _ask(place, f"runs/get?run_id={run_id}")["run"]["info"]


def _ask(place: Place, path: str, body: Any = None) -> Any:
    status, answer = place.team.ask(f"/api/2.0/mlflow/{path}", user=place.team.trainer, body=body)
    assert status == 200, answer
    return json.loads(answer)
