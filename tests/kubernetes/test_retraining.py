"""A CronJob that retrains in the cluster: for the better, for the worse, in vain, and never twice at once."""

import json
from concurrent.futures import Future

import pytest

from tests.kubernetes.schedule import Schedule
from tests.kubernetes.situations import cause_of, ended_with_its_first_cluster

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def schedule(retraining: Future[Schedule]) -> Schedule:
    return retraining.result()


def test_one_that_is_better_is_promoted(schedule: Schedule) -> None:
    assert schedule.verdicts["better"]["promoted"]
    assert schedule.champions["better"] == "weekly"


def test_one_that_is_worse_is_rejected_and_starts_from_the_champion(schedule: Schedule) -> None:
    assert not schedule.verdicts["worse"]["promoted"]
    assert schedule.read("weekly-2", "job.json")["method"]["init"].endswith("/runs/weekly/adapter")
    assert schedule.champions["worse"] == "weekly"


def test_one_that_fails_leaves_the_champion_and_a_failed_kubernetes_job(schedule: Schedule) -> None:
    assert schedule.verdicts["in vain"] is None
    assert schedule.champions["in vain"] == "weekly"
    events = schedule.namespace.get("events")["items"]
    assert any(
        event["reason"] == "BackoffLimitExceeded" and "weekly-retrain" in event["involvedObject"]["name"]
        for event in events
    )
    assert "train.optimizer.lr" in cause_of(schedule.place.run("weekly-3"), "the loss is").cure
    ended_with_its_first_cluster(schedule.place, "weekly-3")


def test_one_that_overlaps_is_not_started(schedule: Schedule) -> None:
    events = schedule.namespace.get("events")["items"]
    assert any(event["reason"] == "JobAlreadyActive" for event in events)


def test_mlflows_alias_is_the_champion(schedule: Schedule) -> None:
    path = "/api/2.0/mlflow/registered-models/alias?name=weekly&alias=champion"
    status, answer = schedule.place.team.ask(path, user=schedule.place.team.trainer)
    assert status == 200, answer
    tracked = schedule.read("weekly", "mlflow.json")["run_id"]
    assert json.loads(answer)["model_version"]["run_id"] == tracked
