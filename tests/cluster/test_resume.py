"""``kill -9`` of a rank, of the driver, of the whole cluster: submitting the same job again is exact.

One job is run twice: to its end without a break and without Ray, and in another store, on Ray, through three deaths.
"""

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from launcher.plan import plan
from launcher.runs import create_or_resume
from tests.cluster.conftest import Started, Utaforge
from tests.cluster.ranks import Ranks, rank_of
from tests.waiting import eventually
from trainer.data.prepare import prepare
from trainer.spec import load_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2700)]
STEPS = 24
JOB = """\
name: sakura
store: {store}
model: {{family: musicgen, pretrained: "random:tiny", segment_seconds: 5}}
method: {{type: lora, rank: 4, alpha: 8, dropout: 0.2}}
data:
  train: [{{dataset: {songs}}}]
  validation: {{fraction: 0.2, by: song}}
  prepare: {{source: {{type: demo, style: b, songs: 30}}}}
train:
  steps: 24
  batch: {{seconds: 120, micro_seconds: 20}}
  optimizer: {{lr: 1.0e-2}}
checkpoint: {{every: 4}}
validation:
  every: 24
  prompts: [{{tags: "祭り さくら", seconds: 0.5, seed: 1}}]
cluster: {{backend: local, workers: 2}}
"""


@dataclass(frozen=True)
class Store:
    """A store with the runs of one job file."""

    folder: Path
    job: Path

    def run(self, name: str = "sakura") -> Path:
        """A run's directory."""
        return self.folder / "runs" / name

    def commits(self) -> list[int]:
        """Steps of the checkpoints that are whole now."""
        return sorted(int(path.parent.name[5:]) for path in self.run().glob("checkpoints/*/manifest.json"))

    def journal(self) -> list[dict]:
        """The journal's entries."""
        lines = (self.run() / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def values(self, *prefixes: str) -> list[tuple[int, str, float]]:
        """(step, key, value) in the journal's order, of keys with one of the prefixes."""
        return [
            (entry["step"], key, value)
            for entry in self.journal()
            for key, value in entry.get("metrics", {}).items()
            if key.startswith(prefixes)
        ]


def store(command: Utaforge, name: str) -> Store:
    folder = command.folder / name
    folder.mkdir()
    job = folder / "sakura.yaml"
    songs = f"file://{command.folder}/songs"
    job.write_text(JOB.format(store=f"file://{folder}", songs=songs), encoding="utf-8")
    return Store(folder, job)


@pytest.fixture(scope="module")
def whole(utaforge: Utaforge) -> Store:
    """The run that nothing happened to, trained by two ranks without Ray."""
    made = store(utaforge, "whole")
    job = load_job(str(made.job))
    prepare(job)
    run = create_or_resume(job, plan(job).as_json()).run
    Ranks(2, made.folder, rank_of, run.url, UTAFORGE_HOME=str(utaforge.home)).end()
    return made


def gone_with_its_first_commit(run_url: str) -> None:
    """A rank that is cut off when a checkpoint is whole, long before the clock has its log copied."""
    from trainer import mirror
    from trainer.checkpoint import Checkpoints
    from trainer.worker import run_rank

    publish = Checkpoints._publish

    def publish_and_die(*arguments: Any) -> None:
        publish(*arguments)
        os._exit(0)

    mirror.SECONDS, Checkpoints._publish = 3600.0, publish_and_die
    run_rank(run_url, lambda: False)


@dataclass(frozen=True)
class Story:
    """The run that was killed three times.

    Attributes:
        store: where it is.
        said: by its three submissions.
        codes: their exit codes; None of the one that was killed itself.
        resumed: the newest commit after each death: of a rank, of the driver, of the cluster.
        tracked: its MLflow run, after each submission.
        left: processes that were there after each submission.
    """

    store: Store
    said: list[str]
    codes: list[int | None]
    resumed: list[int]
    tracked: list[str | None]
    left: list[list[str]]


@pytest.fixture(scope="module")
def story(utaforge: Utaforge, whole: Store) -> Story:
    made = store(utaforge, "killed")
    told = Story(made, [], [], [], [], [])

    def after(step: int) -> bool:
        return any(commit > step for commit in made.commits())

    def note(text: str, code: int | None) -> None:
        told.said.append(text)
        told.codes.append(code)
        told.tracked.append(tracked_as(made))
        told.left.append(utaforge.left_running())

    first = utaforge.start("submit", str(made.job), "--yes")
    first.until(lambda: after(0))
    rank = second_rank(first)
    rank.suspend()  # so that the run stands still until MLflow knows of it
    first.until(lambda: tracked_as(made))
    rank.kill()
    told.resumed.append(first.until(lambda: going_on(first.text))[0])
    first.until(lambda: after(told.resumed[0]))
    for process in first.below("-m trainer.driver"):
        process.kill()
    said = first.end()
    told.resumed.append(made.commits()[-1])
    note(said.text, said.code)

    second = utaforge.start("submit", str(made.job), "--yes")
    second.until(lambda: going_on(second.text) and after(told.resumed[1]))
    second.kill_everything()
    told.resumed.append(made.commits()[-1])
    note(second.text, None)
    sweep(made)

    third = utaforge("submit", str(made.job), "--yes")
    note(third.text, third.code)
    return told


def test_a_rank_that_is_gone_with_its_first_commit_leaves_what_it_said(utaforge: Utaforge, whole: Store) -> None:
    made = store(utaforge, "gone")
    job = load_job(str(made.job))
    run = create_or_resume(job, plan(job).as_json()).run
    Ranks(1, made.folder, gone_with_its_first_commit, run.url, UTAFORGE_HOME=str(utaforge.home)).end()
    assert made.commits() == [4]
    assert "step 4/24 · loss" in (made.run() / "logs/rank-0.log").read_text(encoding="utf-8")
    assert [step for step, _, _ in made.values("train/loss")] == [1, 2, 3, 4]


def test_an_uninterrupted_run_tells_every_step_once(whole: Store) -> None:
    assert [step for step, _, _ in whole.values("train/loss")] == list(range(1, STEPS + 1))


def test_a_killed_rank_is_started_again_by_itself_and_goes_on_from_the_newest_commit(story: Story) -> None:
    text = story.said[0]
    step = story.resumed[0]
    assert step >= 4
    (lost,) = re.findall(r"^a rank was lost: (.+)$", text, re.MULTILINE)
    assert len(lost) < 100
    assert f"starting the ranks again from step {step}\n" in text
    again = text.split(f"going on from step {step}\n")[1]
    assert re.search(r"^step (\d+)/24 · loss", again, re.MULTILINE)[1] == str(step + 1)
    assert "Traceback" not in text


def test_a_killed_driver_is_told_with_the_step_at_which_the_next_submission_continues(story: Story) -> None:
    step = story.resumed[1]
    assert step > story.resumed[0]
    assert story.codes[0] == 5
    assert story.said[0].splitlines()[-1].endswith(f"submitting again continues at step {step}")
    assert "utaforge: run sakura failed: " in story.said[0]
    assert f"run sakura: continues at step {step}\n" in story.said[1]
    assert going_on(story.said[1]) == [step]


def test_a_killed_cluster_and_launcher_cost_nothing_but_the_steps_since_the_newest_commit(story: Story) -> None:
    step = story.resumed[2]
    assert story.resumed[1] < step < STEPS
    assert f"run sakura: continues at step {step}\n" in story.said[2]
    assert going_on(story.said[2]) == [step]
    assert story.codes[2] == 0
    assert "run sakura is finished" in story.said[2]


def test_logs_of_all_attempts_remain(story: Story) -> None:
    driver, rank = (
        (story.store.run() / "logs" / f"{name}.log").read_text(encoding="utf-8") for name in ("driver", "rank-0")
    )
    told = {int(step) for step in re.findall(r"step (\d+)/24 · loss", rank)}
    assert told == set(range(1, STEPS + 1)), "a commit's steps are told before it is whole: nobody makes them again"
    assert f"going on from step {story.resumed[2]}" in rank
    assert "a rank was lost" in driver
    assert f"going on from step {story.resumed[2]}" in driver


def test_nothing_is_left_running_by_any_death(story: Story) -> None:
    assert story.left == [[], [], []]


def test_after_all_deaths_the_journal_holds_every_step_once_with_the_same_bits(whole: Store, story: Story) -> None:
    learnt = "train/", "validation/", "audio/"
    assert story.store.values(*learnt) == whole.values(*learnt)
    steps = Counter(step for step, _, _ in story.store.values("train/loss"))
    assert steps == Counter(range(1, STEPS + 1))
    ends = [entry["end"] for entry in story.store.journal() if "end" in entry]
    assert ends == ["FINISHED"]


def test_after_all_deaths_the_weights_and_songs_are_the_same_bits(whole: Store, story: Story) -> None:
    for file in ("adapter/adapter_model.safetensors", "checkpoints/step-00000024/state.safetensors"):
        expected, found = (load_file(one.run() / file) for one in (whole, story.store))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    song = "audio/step-00000024/prompt-00.flac"
    assert (story.store.run() / song).read_bytes() == (whole.run() / song).read_bytes()
    results = [json.loads((one.run() / "result.json").read_text()) for one in (whole, story.store)]
    kept = [{name: result[name] for name in ("steps", "loss_before", "loss_after", "best_step")} for result in results]
    assert kept[0] == kept[1]


def test_after_all_deaths_one_mlflow_run_holds_the_same_history(whole: Store, story: Story, utaforge: Utaforge) -> None:
    assert len(set(story.tracked)) == 1
    client = MlflowClient(utaforge.mlflow)
    expected, found = (client.get_run(tracked_as(one)) for one in (whole, story.store))
    assert (found.info.status, found.info.run_name) == ("FINISHED", "sakura")
    learnt = {key for key in expected.data.metrics if key.startswith(("train/", "validation/", "audio/"))}
    assert {"train/loss", "train/grad_norm", "validation/loss"} <= learnt <= found.data.metrics.keys()
    for key in learnt:
        assert history(client, found.info.run_id, key) == history(client, expected.info.run_id, key)
    assert [step for step, _ in history(client, found.info.run_id, "train/loss")] == list(range(1, STEPS + 1))
    same = f"tags.`utaforge.run` = '{found.data.tags['utaforge.run']}'"
    assert len(client.search_runs([found.info.experiment_id], same)) == 1


def test_a_finished_job_starts_a_new_run_and_says_so_and_ctrl_c_leaves_nothing(
    whole: Store, utaforge: Utaforge
) -> None:
    again = utaforge.start("submit", str(whole.job), "--yes")
    again.until(lambda: "starting Ray on this machine" in again.text)
    keepers = again.until(lambda: again.below("keeper.py"))
    said = again.interrupt()
    assert "run sakura-2: new (sakura is finished)\n" in said.text
    assert said.code == 130
    assert "run sakura-2 was stopped" in said.text
    assert "from the beginning, since it had no checkpoint yet" in said.text
    eventually(lambda: not any(keeper.is_running() for keeper in keepers))  # nobody waits for one that was just begun
    assert utaforge.left_running() == []


def test_a_used_name_with_a_different_job_is_refused_field_by_field(whole: Store, utaforge: Utaforge) -> None:
    other = ("--set", "validation.prompts.0.tags=子守唄", "--set", "train.steps=25")
    for chosen in ([], ["--run", "sakura-2"]):
        said = utaforge("submit", str(whole.job), "--yes", *other, *chosen)
        assert said.code == 2
        assert "run sakura-2 was made from another job; these fields differ:\n" in said.text
        assert '  validation.prompts.0.tags: "祭り さくら" → "子守唄"\n' in said.text
        assert "  train.steps: 24 → 25\n" in said.text
        assert "--run NEW-NAME" in said.text


def test_a_finished_run_is_not_submitted_by_name(whole: Store, utaforge: Utaforge) -> None:
    said = utaforge("submit", str(whole.job), "--yes", "--run", "sakura")
    assert said.code == 2
    assert "--run sakura: this run is finished" in said.text


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run_id, key)]


def second_rank(submission: Started) -> psutil.Process:
    """The worker that does not keep the journal."""
    workers = [rank for rank in submission.below("RayTrainWorker") if not tracks(rank)]
    (rank,) = workers
    return rank


def tracks(rank: psutil.Process) -> bool:
    return any("trainer.tracking" in " ".join(child.cmdline()) for child in rank.children())


def tracked_as(made: Store) -> str | None:
    """The MLflow run, once there is one."""
    known = made.run() / "mlflow.json"
    return json.loads(known.read_text())["run_id"] if known.exists() else None


def going_on(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"^going on from step (\d+)$", text, re.MULTILINE)]


def sweep(made: Store) -> None:
    """Remove what a keeper that was killed itself could not."""
    for attempt in made.run().glob("attempts/*.json"):
        shutil.rmtree(Path(json.loads(attempt.read_text())["token_file"]).parent, ignore_errors=True)
