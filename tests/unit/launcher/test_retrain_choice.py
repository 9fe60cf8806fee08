"""What a retraining decides before anything is submitted."""

import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from launcher.cli import run as utaforge
from launcher.retrain import candidate, retrain, starting_from
from launcher.runs import Busy, Run, create_or_resume
from trainer.spec import DataError, Job, JobError
from trainer.store import open_store

Jobs = Callable[..., Job]
RETRAIN = ("retrain={cron: '0 3 * * 0'}",)


@pytest.fixture
def retrained(job: Jobs, store: str) -> Jobs:
    """A job to be retrained, whose datasets have a version each."""
    for name in ("demo", "取り置き"):
        publish(f"{store}/datasets/{name}", 1, "first")
    held_out = f"data.validation={{dataset: {store}/datasets/取り置き}}"
    return lambda *overrides: job(*RETRAIN, held_out, *overrides)


def publish(url: str, version: int, digest: str) -> None:
    open_store(url).put(f"versions/{version:06d}.json", json.dumps({"digest": digest}).encode())


def pin(url: str, version: int, digest: str) -> dict[str, Any]:
    return {"url": url, "version": version, "digest": digest}


def data(store: str, version: int = 1, digest: str = "first") -> dict[str, Any]:
    return {
        "train": [pin(f"{store}/datasets/demo", version, digest)],
        "validation": pin(f"{store}/datasets/取り置き", 1, "first"),
    }


def put(run: Run, path: str, content: dict[str, Any]) -> None:
    run.store.put(path, json.dumps(content).encode())


def made(job: Job, store: str, *, judged: bool) -> Run:
    """A retraining that was judged, or was cut off in its training."""
    run = create_or_resume(job, {}).run
    put(run, "retrain.json", {"champion": 0, "by": None})
    put(run, "data.json", data(store))
    if judged:
        put(run, "result.json", {"loss_after": 4.5, "adapter": "adapter"})
        put(run, "verdict.json", {"promoted": False, "reasons": [], "before": 5.0, "after": 5.0})
    return run


def champion(run: Run, store: str, number: int = 1) -> dict[str, Any]:
    """Make ``run`` the champion."""
    page = {"number": number, "run": run.name, "adapter": f"{run.url}/adapter", "data": data(store)}
    open_store(f"{store}/champions/demo").put(f"{number:06d}.json", json.dumps(page).encode())
    return page


def decided(job: Job) -> int:
    """The exit code, where nothing is submitted."""
    return retrain(job, lambda *_: pytest.fail("the trainer is not needed"), lambda _: None).exit_code


def test_without_new_songs_there_is_nothing_to_do_whatever_the_verdict_was(retrained: Jobs, store: str) -> None:
    made(retrained(), store, judged=True)
    assert decided(retrained()) == 10


def test_a_failed_run_on_songs_that_another_was_judged_on_is_no_reason(retrained: Jobs, store: str) -> None:
    made(retrained(), store, judged=True)
    assert made(retrained(), store, judged=False).name == "demo-2"
    assert decided(retrained()) == 10


def test_a_new_version_with_the_same_songs_is_nothing_new(retrained: Jobs, store: str) -> None:
    made(retrained(), store, judged=True)
    publish(f"{store}/datasets/demo", 2, "first")
    assert decided(retrained()) == 10


def test_what_a_person_promoted_counts_as_trained(retrained: Jobs, store: str) -> None:
    champion(create_or_resume(retrained(), {}).run, store)
    assert decided(retrained()) == 10


@pytest.mark.parametrize(
    ("host", "pid", "age"), [(None, os.getppid(), 0.0), ("遠く", 1, 30.0)], ids=["here", "on another machine"]
)
def test_a_retraining_at_work_is_named_and_left_alone(
    retrained: Jobs, store: str, host: str | None, pid: int, age: float
) -> None:
    run = made(retrained(), store, judged=False)
    by = {"host": host or os.uname().nodename, "user": "花子", "pid": pid, "time": time.time() - age}
    put(run, "retrain.json", {"champion": 0, "by": by})
    with pytest.raises(Busy, match=r"花子 on .+ is retraining demo at this moment") as caught:
        decided(retrained())
    assert caught.value.exit_code == 12


def test_a_champion_that_does_not_fit_is_refused_with_the_fields(retrained: Jobs, store: str) -> None:
    champion(create_or_resume(retrained(), {}).run, store)
    with pytest.raises(JobError) as caught:
        decided(retrained("method.rank=32", "train.steps=7"))
    assert "the champion demo does not fit this job" in caught.value.problem
    assert caught.value.problem.splitlines()[1:] == ["  method.rank: 16 → 32"]


def test_the_validation_songs_of_the_champion_cannot_be_exchanged(retrained: Jobs, store: str) -> None:
    champion(create_or_resume(retrained(), {}).run, store)
    publish(f"{store}/datasets/別", 1, "other")
    with pytest.raises(JobError, match=r"the champion demo was judged on .*取り置き, and this job names .*別"):
        decided(retrained(f"data.validation={{dataset: {store}/datasets/別}}"))


def test_new_validation_songs_are_not_used_and_that_is_said(retrained: Jobs, store: str) -> None:
    champion(create_or_resume(retrained(), {}).run, store)
    publish(f"{store}/datasets/取り置き", 2, "more")
    said: list[str] = []
    assert retrain(retrained(), lambda *_: 0, said.append).exit_code == 10
    (line,) = said
    assert line.endswith("取り置き stays at version 1, on which champions are judged; 2 is not used")


def test_a_job_without_the_section_or_without_songs_says_what_to_do(job: Jobs, retrained: Jobs) -> None:
    with pytest.raises(JobError, match="demo has no retrain section"):
        decided(job())
    with pytest.raises(DataError, match="/datasets/無い holds no dataset"):
        decided(retrained("data.train=[{dataset: file:///datasets/無い}]"))


def test_a_finished_run_without_a_verdict_is_judged_first(retrained: Jobs, store: str) -> None:
    run = made(retrained(), store, judged=True)
    run.store.delete(["verdict.json"])
    asked: list[tuple[str, ...]] = []

    def trainer(*arguments: str) -> int:
        asked.append(arguments)
        put(run, "verdict.json", {"promoted": True, "reasons": [], "before": 5.0, "after": 4.5})
        return 0

    outcome = retrain(retrained(), trainer, lambda _: None)
    assert (outcome.exit_code, asked) == (0, [("trainer.gate", run.url)])


def test_a_retraining_that_was_cut_off_goes_on_with_the_start_it_began_with(retrained: Jobs, store: str) -> None:
    run = made(starting_from(retrained(), "s3://歌/adapter"), store, judged=False)
    job, name = candidate(retrained("checkpoint.every=7"), None, data(store), run, {1: run})
    assert (name, getattr(job.method, "init", None)) == ("demo", "s3://歌/adapter")


def test_it_does_not_go_on_if_songs_job_or_champion_have_changed(retrained: Jobs, store: str) -> None:
    run = made(retrained(), store, judged=False)
    now = champion(run, store)
    new_songs = data(store, 2, "second")
    for job, page, versions in (
        (retrained(), None, new_songs),
        (retrained("train.optimizer.lr=1.0e-3"), None, data(store)),
        (retrained(), now, data(store)),
    ):
        chosen, name = candidate(job, page, versions, run, {1: run})
        assert (name, getattr(chosen.method, "init", None)) == ("demo-2", page["adapter"] if page else None)


def test_the_start_is_part_of_the_job_and_nothing_else_changes(retrained: Jobs) -> None:
    job = starting_from(retrained(), "s3://歌/adapter")
    assert starting_from(job, None) == retrained()
    assert getattr(job.method, "init", None) == "s3://歌/adapter"


def test_a_run_that_is_not_there_is_not_promoted(store: str) -> None:
    assert utaforge(["promote", "桜", "--store", store]) == 3
