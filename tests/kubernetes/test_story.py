"""One run, and all that may happen to it on a cluster: at its end it is the run to which nothing happened."""

import json
import re
from concurrent.futures import Future
from typing import Any

import pytest

from launcher.runs import Run, runs_of
from tests.kubernetes.place import Place
from tests.kubernetes.same import same_bits
from tests.kubernetes.story import STORY
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(3600)
NONE_LEFT = ("rayjobs", "rayclusters", "pods", "jobs", "services", "poddisruptionbudgets", "networkpolicies")
"""Kinds of objects that belong to a run."""
GONE_SECONDS = 300.0
"""A worker's pod that does not reach its head does not hear that it is to end, and is killed after its two minutes."""


@pytest.fixture(scope="module")
def story(told: Future[str]) -> str:
    """What the launcher said until the end."""
    return told.result()


def test_it_ends_as_the_run_to_which_nothing_happened(place: Place, story: str, here: Future[Run]) -> None:
    same_bits(place.run(STORY), here.result())


def test_one_cluster_was_lost_with_its_head_and_none_besides(place: Place, story: str) -> None:
    assert story.count("cluster 1 of at most 3 was lost") == 1
    (rayjob,) = place.objects("rayjobs", STORY)
    assert rayjob["status"]["failed"] == 1
    assert place.run(STORY).attempts() == 1


def test_each_loss_is_told_by_what_it_was(story: str) -> None:
    assert re.search("(its machine or|this) pod ran out of memory", story)
    assert "the server cannot be reached" in story
    assert "MLflow at http://mlflow:5000 is out of reach" in story
    assert "Traceback" not in story
    assert "autoscaler" not in story


def test_mlflow_has_one_run_with_every_step_once(place: Place, story: str) -> None:
    steps_taken = place.run(STORY).job.train.steps
    tracked = json.loads(place.run(STORY).store.get("mlflow.json"))["run_id"]
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
