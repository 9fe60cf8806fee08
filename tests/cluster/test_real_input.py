"""Real music and a real speaker, prepared and trained on with everything in a bucket behind real HTTP."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.cluster.conftest import Said, Utaforge
from trainer.checkpoint import Checkpoints
from trainer.data.dataset import Dataset
from trainer.rundir import RunDirectory
from trainer.store import Store, open_store

DATA = Path(__file__).parents[3] / "shared" / "data"
pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(2700),
    pytest.mark.skipif(
        not (DATA / "music").is_dir() and "CI" not in os.environ, reason=f"the real songs are not there: {DATA}"
    ),
]
STORE = "s3://music/本物"
CANARY = "canary7Kq2vXw9TzSecret"
JOB = """\
name: wesnoth
store: s3://music/本物
model: {family: musicgen, pretrained: "builtin:pocket", segment_seconds: 5}
method: {type: lora, rank: 4, alpha: 8}
data:
  train: [{dataset: s3://music/本物/datasets/SET}]
  validation: {fraction: 0.25, by: song}
  prepare: {source: SOURCE, shard_songs: 3}
train:
  steps: 4
  batch: {seconds: 20}
  optimizer: {lr: 1.0e-3}
checkpoint: {every: 2}
validation:
  every: 4
  prompts: [{tags: "オーケストラ, 冒険", seconds: 1, seed: 1}]
cluster: {backend: local, workers: 2}
"""


@pytest.fixture(scope="module")
def bucket(server: str) -> Iterator[dict[str, str]]:
    """What people set to reach the bucket, also for this process."""
    variables = {"AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": CANARY}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@dataclass(frozen=True)
class Trained:
    """The finished run on real music."""

    command: Utaforge
    said: Said
    run: RunDirectory


@pytest.fixture(scope="module")
def trained(bucket: dict[str, str], utaforge: Utaforge) -> Trained:
    utaforge.environment.update(bucket)
    said = utaforge("submit", job(utaforge, "music", {"type": "folder", "path": str(DATA / "music")}), "--yes")
    assert said.code == 0, said.text
    return Trained(utaforge, said, RunDirectory(f"{STORE}/runs/wesnoth"))


def job(command: Utaforge, name: str, source: dict[str, str]) -> str:
    path = command.folder / f"{name}.yaml"
    path.write_text(JOB.replace("SET", name).replace("SOURCE", json.dumps(source)), encoding="utf-8")
    return str(path)


def test_real_songs_become_shards_in_the_bucket_with_their_tags_and_lyrics(trained: Trained, tmp_path: Path) -> None:
    data = Dataset.open(f"{STORE}/datasets/music", cache=tmp_path)
    clips = sorted((DATA / "music").glob("*.ogg"))
    assert data.songs.ids == [clip.stem for clip in clips]
    assert not data.failures
    assert len(set(data.songs.shards)) == 3
    for clip in clips:
        song = data.song(clip.stem)
        lyrics = clip.with_suffix(".lyrics")
        assert song.tags == clip.with_suffix(".txt").read_text(encoding="utf-8").strip()
        assert song.lyrics == (lyrics.read_text(encoding="utf-8").strip() if lyrics.exists() else "")
        assert song.seconds == pytest.approx(soundfile.info(clip).duration, abs=0.02)
        codes = song.arrays["codes"]
        assert codes.shape[1] == pytest.approx(50 * song.seconds, abs=2)
        assert len(np.unique(codes)) > 40


def test_training_on_real_songs_leaves_whole_checkpoints_and_an_adapter_in_the_bucket(
    trained: Trained, tmp_path: Path
) -> None:
    store = trained.run.store
    result = json.loads(store.get("result.json"))
    assert result["steps"] == 4
    assert result["loss_after"] < result["loss_before"]
    checkpoints = Checkpoints(store.at("checkpoints"), trained.run.job.checkpoint.keep)
    assert [commit.step for commit in checkpoints.commits()] == [4, 2]
    for commit in checkpoints.commits():
        checkpoints.restore(commit, tmp_path / commit.name)
    assert store.at("adapter").fetch(tmp_path / "adapter")["step"] == 4
    song = tmp_path / "song.flac"
    store.download("audio/step-00000004/prompt-00.flac", song)
    assert soundfile.info(song).duration == pytest.approx(1, abs=0.05)
    losses = [json.loads(line)["metrics"].get("train/loss") for line in lines(store) if "metrics" in line]
    assert len([loss for loss in losses if loss is not None]) == 4


def test_the_summary_and_the_commands_name_the_bucket(trained: Trained) -> None:
    for name in ("adapter", "checkpoints", "audio"):
        assert f"  {name}: {STORE}/runs/wesnoth/{name}\n" in trained.said.text
    assert f"utaforge generate wesnoth --store {STORE} " in trained.said.text
    (listed,) = json.loads(trained.command.output("list", "--json", "--store", STORE))
    assert (listed["name"], listed["state"], listed["url"]) == ("wesnoth", "finished", trained.run.url)


def test_a_real_speaker_is_prepared_with_transcripts(trained: Trained, tmp_path: Path) -> None:
    source = {"type": "speakers", "path": str(DATA / "speech")}
    told = json.loads(trained.command.output("prepare", job(trained.command, "speech", source), "--json"))
    recordings = {path.relative_to(DATA / "speech"): path for path in (DATA / "speech").glob("*/*.wav")}
    short = {str(name) for name, path in recordings.items() if soundfile.info(path).duration < 1}
    assert {failure["name"] for failure in told["failures"]} == short
    assert all(failure["reason"].startswith("is too short") for failure in told["failures"])
    data = Dataset.open(f"{STORE}/datasets/speech", cache=tmp_path)
    assert (told["songs"], told["version"], told["digest"]) == (len(data.songs), 1, data.digest)
    assert set(data.songs.ids) == {str(name.with_suffix("")) for name in recordings if str(name) not in short}
    assert set(data.songs.groups) == {"allison"}
    for name in data.songs.ids:
        assert data.song(name).lyrics == (DATA / "speech" / f"{name}.lab").read_text(encoding="utf-8").strip()


def test_secrets_are_in_no_object_no_file_and_no_output(trained: Trained) -> None:
    secret = CANARY.encode()
    bucket = open_store("s3://music")
    paths = [entry.path for entry in bucket.list("本物")]
    assert {"本物/runs/wesnoth/job.json", "本物/runs/wesnoth/logs/driver.log"} <= set(paths)
    assert [path for path in paths if secret in bucket.get(path)] == []
    files = [path for path in trained.command.folder.rglob("*") if path.is_file()]
    assert trained.command.home / "mlflow.db" in files
    assert [path for path in files if secret in path.read_bytes()] == []


def test_nothing_of_the_run_lies_on_this_machine(trained: Trained) -> None:
    names = {path.name for path in trained.command.folder.iterdir()}
    assert {name for name in names if not re.fullmatch(r"home|tmp|command-\d+\.log|\w+\.yaml", name)} == set()
    assert trained.command.left_running() == []


def lines(store: Store) -> list[str]:
    return store.get("metrics.jsonl").decode().splitlines()
