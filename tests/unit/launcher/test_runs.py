import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.backends.base import Backend, Say
from launcher.backends.ray_jobs import RayJobs
from launcher.listing import all_runs
from launcher.runs import Run, create_or_resume, find_run
from trainer.spec import ClusterError, Job, JobError, StoreError, job_from_json
from trainer.spec.cluster import Budget

Jobs = Callable[..., Job]
PLAN: dict[str, Any] = {"ranks": 2}


def submitted(job: Job, name: str | None = None) -> Run:
    return create_or_resume(job, PLAN, name).run


def put(run: Run, path: str, content: dict[str, Any]) -> None:
    run.store.put(path, json.dumps(content, ensure_ascii=False).encode())


def last_heard(run: Run, path: str, when: float) -> None:
    """Let a file be as old as that."""
    assert run.store.local
    os.utime(run.store.local / path, (when, when))


def attempted(run: Run, when: float) -> None:
    """An attempt whose cluster is gone."""
    gone = {
        "host": __import__("socket").gethostname(),
        "user": "歌",
        "backend": "local",
        "address": "http://127.0.0.1:1",
    }
    number = run.attempts() + 1
    rest = {"number": number, "time": when, "submission": f"{run.name}-{number}", "token_file": None}
    put(run, f"attempts/{number:04d}.json", {**gone, **rest})


def test_the_first_run_has_the_jobs_name_and_holds_job_and_plan(job: Jobs, store: str) -> None:
    chosen = create_or_resume(job(), PLAN)
    assert chosen.news == "run demo: new"
    assert chosen.run.url == f"{store}/runs/demo"
    assert job_from_json(chosen.run.store.get("job.json").decode()) == job()
    assert json.loads(chosen.run.store.get("plan.json")) == PLAN


def test_an_unfinished_run_continues_at_its_newest_whole_checkpoint(job: Jobs) -> None:
    run = submitted(job())
    run.store.put("checkpoints/step-00000040/manifest.json", b"{}")
    run.store.put("checkpoints/step-00000080/adapter.safetensors", b"torn")
    chosen = create_or_resume(job(), PLAN)
    assert (chosen.run.name, chosen.news) == ("demo", "run demo: continues at step 40")


def test_a_finished_job_starts_a_new_run_and_says_so(job: Jobs) -> None:
    for name, news in [
        ("demo", "run demo: new"),
        ("demo-2", "run demo-2: new (demo is finished)"),
        ("demo-3", "run demo-3: new (demo-2 is finished)"),
    ]:
        chosen = create_or_resume(job(), PLAN)
        assert (chosen.run.name, chosen.news) == (name, news)
        put(chosen.run, "result.json", {"steps": 120})


def test_a_changed_job_does_not_continue_a_run_and_the_fields_are_named(job: Jobs) -> None:
    submitted(job())
    with pytest.raises(JobError) as caught:
        submitted(job("train.optimizer.lr=0.5", "validation.prompts.0.tags=祭り"))
    assert caught.value.problem == (
        "run demo was made from another job; these fields differ:\n"
        "  train.optimizer.lr: 0.0001 → 0.5\n"
        '  validation.prompts.0.tags: "gentle, 子守唄" → "祭り"'
    )
    assert caught.value.cure == "put them back to continue it, or start a new run: --run NEW-NAME"


def test_where_and_how_often_may_change_between_attempts(job: Jobs) -> None:
    submitted(job())
    changed = job("cluster={backend: local, workers: 1}", "checkpoint.every=7", "tracking.experiment=別の実験")
    run = submitted(changed.model_copy(update={"budget": Budget(hours=9)}))
    assert run.name == "demo"
    assert (run.job.checkpoint.every, run.job.tracking.experiment) == (7, "別の実験")


def test_a_named_run_is_made_then_continued_then_refused_once_finished(job: Jobs) -> None:
    run = submitted(job(), "other")
    assert create_or_resume(job(), PLAN, "other").news == "run other: starts again, it had no checkpoint"
    put(run, "result.json", {"steps": 120})
    with pytest.raises(JobError, match="--run other: this run is finished"):
        submitted(job(), "other")
    assert submitted(job()).name == "demo"


@pytest.mark.parametrize("name", ["../demo", "さくら", "-x", "a" * 64])
def test_a_name_that_leaves_the_folder_or_fits_nowhere_is_refused(job: Jobs, name: str, store: str) -> None:
    with pytest.raises(JobError, match="a run's name has 1 to 63 characters"):
        submitted(job(), name)
    with pytest.raises(StoreError, match="there is no run"):
        find_run(store, name)


def test_a_run_of_another_job_with_a_similar_name_is_left_alone(job: Jobs) -> None:
    submitted(job("name=demo-2"))
    assert submitted(job()).name == "demo"


def test_a_run_that_was_killed_is_stopped_at_its_checkpoint(job: Jobs) -> None:
    run = submitted(job())
    attempted(run, time.time())
    run.store.put("checkpoints/step-00000040/manifest.json", b"{}")
    lines = [{"step": step, "time": 5e9 + step, "metrics": {"train/loss": 5 - step / 50}} for step in (45, 50)]
    run.store.put("metrics.jsonl", ("\n".join(json.dumps(line) for line in lines) + '\n{"step": 55, "ti').encode())
    status = run.status()
    assert (str(status), status.loss, status.attempts) == ("stopped at step 40 of 120", 4.0, 1)


def test_a_failure_counts_until_the_next_attempt(job: Jobs) -> None:
    run = submitted(job())
    attempted(run, 1000.0)
    put(
        run,
        "failure.json",
        {"time": 1001.0, "attempt": 1, "problem": "the loss is NaN 歌", "cure": "lower the rate", "exit_code": 6},
    )
    status = run.status()
    assert (status.state, status.problem, status.cure) == ("failed", "the loss is NaN 歌", "lower the rate")
    attempted(run, 1002.0)
    assert run.status().state == "stopped"


def test_a_finished_run_is_at_its_last_step_and_cannot_be_cancelled(job: Jobs) -> None:
    run = submitted(job())
    attempted(run, time.time())
    put(run, "result.json", {"steps": 120})
    assert (run.status().state, run.status().step) == ("finished", 120)
    with pytest.raises(ClusterError, match="run demo is not running: it is finished"):
        run.cancel()
    assert run.live_log() is None


def test_a_run_on_another_machine_counts_as_running_while_it_is_heard_of(job: Jobs) -> None:
    run = submitted(job())
    attempt = {"number": 1, "host": "elsewhere", "user": "歌", "backend": "local", "address": "http://127.0.0.1:1"}
    put(run, "attempts/0001.json", {**attempt, "time": time.time(), "submission": "demo-1", "token_file": None})
    with pytest.raises(ClusterError, match="run demo is at work already, on elsewhere since"):
        submitted(job())
    last_heard(run, "attempts/0001.json", 1000.0)
    assert submitted(job()).name == "demo"


def test_the_clock_of_whoever_submitted_a_run_does_not_say_how_long_it_is_silent(job: Jobs) -> None:
    run = submitted(job())
    ahead = {"time": time.time() + 3600, "submission": "demo-1", "token_file": None}
    attempt = {"number": 1, "host": "elsewhere", "user": "歌", "backend": "local", "address": "http://127.0.0.1:1"}
    put(run, "attempts/0001.json", {**attempt, **ahead})
    last_heard(run, "attempts/0001.json", time.time() - 121)
    assert submitted(job()).name == "demo"


def test_listing_shows_every_run_and_an_unreadable_one_as_failed(job: Jobs, store: str, tmp_path: Path) -> None:
    submitted(job())
    submitted(job("name=uta"))
    broken = tmp_path / "store" / "runs" / "broken" / "job.json"
    broken.parent.mkdir()
    broken.write_text("{}")
    found = {status.name: status.state for status in all_runs(store)}
    assert found == {"broken": "failed", "demo": "stopped", "uta": "stopped"}


def test_an_unknown_run_is_named_with_those_that_exist(job: Jobs, store: str) -> None:
    submitted(job())
    with pytest.raises(StoreError, match=r"there is no run 'nix' in .*; there are: demo"):
        find_run(store, "nix")


def test_of_two_submissions_that_both_found_the_run_idle_one_gets_it(job: Jobs) -> None:
    class Somewhere(Backend):
        name = "local"

        def start(self, say: Say) -> RayJobs:
            return RayJobs("http://127.0.0.1:1")

        def close(self) -> None: ...

    backend, jobs = Somewhere(), RayJobs("http://127.0.0.1:1")
    first, second = submitted(job()), submitted(job())
    assert first.begin_attempt(backend, jobs).number == 1
    elsewhere = {**json.loads(first.store.get("attempts/0001.json")), "host": "別の機械"}
    put(first, "attempts/0001.json", elsewhere)
    with pytest.raises(ClusterError, match="run demo is at work already, on 別の機械"):
        second.begin_attempt(backend, jobs)
