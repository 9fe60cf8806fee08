"""Retraining on a real Ray and a real MLflow: one store, one job, and what becomes of its champion."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from launcher.plan import plan
from launcher.runs import create_or_resume
from tests.cluster.conftest import Said, Utaforge
from tests.cluster.ranks import Ranks, rank_of
from trainer.data.prepare import prepare
from trainer.spec import load_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(2700)]
JOB = """\
name: sakura
store: {store}
model: {{family: musicgen, pretrained: "random:tiny", segment_seconds: 5}}
method: {{type: lora, rank: 4, alpha: 8}}
data:
  train: [{{dataset: {store}/songs}}]
  validation: {{dataset: {store}/held-out}}
  prepare: {{source: {{type: demo, style: b, songs: 4}}}}
train: {{steps: 6, batch: {{songs: 4}}, optimizer: {{lr: 1.0e-2}}}}
checkpoint: {{every: 3}}
validation:
  every: 6
  prompts: [{{tags: "祭り さくら", seconds: 0.5, seed: 1}}]
cluster: {{backend: local, workers: 1}}
retrain: {{cron: "0 3 * * 0", timezone: Asia/Tokyo}}
"""
HELD_OUT = ("--set", "data.train=[{dataset: STORE/held-out}]", "--set", "data.validation={fraction: 0.5, by: song}")
MORE_SONGS = ("--set", "data.prepare.source.songs=6")


@dataclass
class Story:
    """What each retraining said, and the champion after it."""

    store: Path
    command: Utaforge
    job: Path
    said: dict[str, Said] = field(default_factory=dict)
    champions: dict[str, str | None] = field(default_factory=dict)
    aliases: dict[str, str | None] = field(default_factory=dict)

    def retrain(self, chapter: str, *options: str) -> Said:
        """Retrain, as the chapter called so."""
        return self.told(chapter, self.command("retrain", str(self.job), *options))

    def told(self, chapter: str, said: Said) -> Said:
        """Keep what was said, and who is the champion now."""
        self.said[chapter], self.champions[chapter], self.aliases[chapter] = said, self.champion(), self.alias()
        return said

    def champion(self) -> str | None:
        """The run that the store's book of champions ends with."""
        pages = sorted(self.store.glob("champions/sakura/*.json"))
        return json.loads(pages[-1].read_text())["run"] if pages else None

    def alias(self) -> str | None:
        """The run that MLflow's alias points to."""
        client = MlflowClient(self.command.mlflow)
        try:
            version = client.get_model_version_by_alias("sakura", "champion")
        except MlflowException:
            return None
        return client.get_run(version.run_id).info.run_name

    def file(self, run: str, path: str) -> Path:
        """A file of a run."""
        return self.store / "runs" / run / path

    def read(self, run: str, path: str) -> Any:
        """A JSON file of a run."""
        return json.loads(self.file(run, path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def story(utaforge: Utaforge) -> Story:
    store = utaforge.folder / "store"
    job = utaforge.folder / "sakura.yaml"
    job.write_text(JOB.format(store=f"file://{store}"), encoding="utf-8")
    story = Story(store, utaforge, job)
    assert story.alias() is None, "MLflow's tables are there before a run has to wait for them"
    options = [option.replace("STORE", f"file://{store}") for option in HELD_OUT]
    prepared = utaforge("prepare", str(job), *options, "--set", "retrain=null", "--set", "data.prepare.source.songs=3")
    assert prepared.code == 0, prepared.text

    first = load_job(str(job))
    prepare(first)
    run = create_or_resume(first, plan(first).as_json()).run
    run.store.put("retrain.json", b'{"champion": 0, "by": null}')
    Ranks(1, utaforge.folder, rank_of, run.url, UTAFORGE_HOME=str(utaforge.home)).end()
    story.retrain("first")
    story.retrain("nothing new")
    at_work = utaforge.start("retrain", str(job), *MORE_SONGS)
    at_work.until(lambda: story.file("sakura-2", "retrain.json").exists())
    story.retrain("a second at the same time", *MORE_SONGS)
    for driver in at_work.until(lambda: at_work.below("-m trainer.driver")):
        driver.kill()
    story.told("failed", at_work.end())
    story.retrain("new songs", *MORE_SONGS)
    story.told("an older one by hand", utaforge("promote", "sakura", "--job", str(job)))
    lock = utaforge.home / "mlflow.db.lock"
    lock.unlink()
    lock.mkdir()
    story.told("without MLflow", utaforge("promote", "sakura-2", "--job", str(job)))
    lock.rmdir()
    story.told("MLflow is back", utaforge("sync", "sakura-2", "--job", str(job)))
    return story


def test_a_run_that_was_cut_off_before_its_verdict_is_judged_and_the_first_becomes_the_champion(story: Story) -> None:
    said = story.said["first"]
    assert said.code == 0, said.text
    assert "run sakura was cut off before its verdict: judging it now" in said.text
    assert "run sakura is promoted" in said.text
    assert story.champions["first"] == story.aliases["first"] == "sakura"
    assert story.read("sakura", "job.json")["method"]["init"] is None


def test_without_new_songs_there_is_nothing_to_do(story: Story) -> None:
    said = story.said["nothing new"]
    assert said.code == 10, said.text
    assert "nothing to do: sakura has no new songs" in said.text
    assert story.champions["nothing new"] == "sakura"


def test_two_are_never_at_it(story: Story) -> None:
    said = story.said["a second at the same time"]
    assert said.code == 12, said.text
    assert re.search(r"utaforge: \S+ on \S+ is retraining sakura-2 at this moment\n", said.text)


def test_new_songs_are_trained_on_from_the_champion_and_what_is_better_is_promoted(story: Story) -> None:
    said = story.said["new songs"]
    assert said.code == 0, said.text
    assert story.champions["new songs"] == story.aliases["new songs"] == "sakura-2"
    assert story.read("sakura-2", "job.json")["method"]["init"] == f"file://{story.store}/runs/sakura/adapter"
    first, second = story.read("sakura", "result.json"), story.read("sakura-2", "result.json")
    assert second["loss_before"] == pytest.approx(first["loss_after"], rel=1e-5)
    assert second["loss_after"] < second["loss_before"]
    versions = [story.read(run, "data.json") for run in ("sakura", "sakura-2")]
    assert [data["train"][0]["version"] for data in versions] == [1, 2]
    assert versions[0]["validation"] == versions[1]["validation"]


def test_the_champion_sounds_in_the_next_run_as_it_did_at_its_own_end(story: Story) -> None:
    end, start = (
        story.store / "runs" / run / f"audio/step-{step:08d}/prompt-00.flac"
        for run, step in (("sakura", 6), ("sakura-2", 0))
    )
    assert start.read_bytes() == end.read_bytes()


def test_a_failed_run_leaves_the_champion_and_is_gone_on_with(story: Story) -> None:
    said = story.said["failed"]
    assert said.code == 5, said.text
    assert "utaforge: run sakura-2 failed: " in said.text
    assert "Traceback" not in said.text
    assert story.champions["failed"] == story.aliases["failed"] == "sakura"
    assert "run sakura-2: starts again, it had no checkpoint" in story.said["new songs"].text


def test_a_person_promotes_an_older_run_again(story: Story) -> None:
    said = story.said["an older one by hand"]
    assert said.code == 0, said.text
    assert "sakura is the champion of sakura now" in said.text
    assert story.champions["an older one by hand"] == story.aliases["an older one by hand"] == "sakura"
    client = MlflowClient(story.command.mlflow)
    assert len(client.search_model_versions("name = 'sakura'")) == 2


def test_without_mlflow_the_stores_word_stands_and_sync_tells_it_later(story: Story) -> None:
    said = story.said["without MLflow"]
    assert said.code == 0, said.text
    assert "tell it with `utaforge sync sakura-2`" in said.text
    assert (story.champions["without MLflow"], story.aliases["without MLflow"]) == ("sakura-2", "sakura")
    assert story.said["MLflow is back"].code == 0, story.said["MLflow is back"].text
    assert story.aliases["MLflow is back"] == "sakura-2"


def test_what_is_worse_is_rejected_with_a_report(story: Story) -> None:
    for page in sorted(story.store.glob("champions/sakura/*.json"))[1:]:
        page.unlink()
    story.file("sakura-2", "verdict.json").unlink()
    worse = story.read("sakura-2", "result.json") | {"loss_after": 9.9}
    story.file("sakura-2", "result.json").write_text(json.dumps(worse), encoding="utf-8")
    said = story.retrain("worse")
    assert said.code == 11, said.text
    assert "run sakura-2 is rejected" in said.text
    assert "held-out loss did not fall" in said.text
    assert story.champions["worse"] == "sakura"
    report = story.file("sakura-2", "report.md").read_text(encoding="utf-8")
    assert report.startswith("# sakura-2: rejected\n\nIt started from the champion sakura and had to beat it.\n")
    assert "> 祭り さくら\n" in report
    client = MlflowClient(story.command.mlflow)
    run_id = story.read("sakura-2", "mlflow.json")["run_id"]
    assert "report.md" in {info.path for info in client.list_artifacts(run_id)}


def test_nothing_is_left_running(story: Story) -> None:
    assert story.command.left_running() == []
