"""What a rehearsal keeps of a job, what it replaces, and that it says so."""

from pathlib import Path

import pytest

from launcher.differences import changes
from launcher.rehearse import SONGS, rehearse, shrunk
from trainer.spec import Job, JobError, load_job

JOB = """\
name: matsuri
store: s3://音楽
model: {{family: heartmula, pretrained: "s3://weights/heartmula", segment_seconds: 12}}
method: {{type: lora, preset: heartmula/attention, init: "s3://adapters/春"}}
data:
  train: [{{dataset: s3://音楽/祭り}}]
  prepare: {{source: {{type: folder, path: {songs}}}, max_seconds: 300}}
train: {{steps: 2000, batch: {{seconds: 600}}, precision: bf16}}
validation: {{prompts: [{{tags: "祭り, 太鼓", lyrics: "さくら", seconds: 30, seed: 1}}]}}
cluster: {{backend: local, profile: rtx4090, workers: 1}}
"""


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return written(tmp_path, tmp_path / "歌")


def written(folder: Path, songs: Path) -> Job:
    path = folder / "matsuri.yaml"
    path.write_text(JOB.format(songs=songs), encoding="utf-8")
    return load_job(str(path), to_run=False)


def test_songs_of_this_machine_are_rehearsed_with_as_the_job_prepares_them(job: Job, tmp_path: Path) -> None:
    (tmp_path / "歌").mkdir()
    prepare = shrunk(job, tmp_path / "稽古").data.prepare
    assert prepare is not None and job.data.prepare is not None
    assert prepare == job.data.prepare.model_copy(update={"limit": SONGS})


def test_songs_that_are_elsewhere_are_replaced_by_the_demos(job: Job, tmp_path: Path) -> None:
    prepare = shrunk(job, tmp_path / "稽古").data.prepare
    assert prepare is not None
    assert (prepare.source.type, prepare.limit) == ("demo", None)


def test_what_is_learnt_and_how_stays_as_the_job_has_it(job: Job, tmp_path: Path) -> None:
    small = shrunk(job, tmp_path / "稽古")
    assert small.method == job.method.model_copy(update={"init": None})
    assert (small.model.family, small.model.segment_seconds) == ("heartmula", 12)
    assert small.train.optimizer == job.train.optimizer
    assert [prompt.tags for prompt in small.validation.prompts] == ["祭り, 太鼓"]


def test_every_value_that_is_replaced_is_told(job: Job, tmp_path: Path) -> None:
    told = list(changes(job, shrunk(job, tmp_path / "稽古")))
    for line in (
        'store: "s3://音楽" → "file://',
        'model.pretrained: "s3://weights/heartmula" → "random:tiny"',
        'method.init: "s3://adapters/春" → nothing',
        "data.prepare.source.type: ",
        "data.prepare.max_seconds: 300.0 → nothing",
        "train.steps: 2000 → 20",
        'train.precision: "bf16" → "auto"',
        "validation.prompts.0.seconds: 30.0 → 2.0",
        'cluster.profile: "rtx4090" → "cpu"',
    ):
        assert any(one.startswith(line) for one in told), line


def test_two_jobs_of_one_name_are_refused(job: Job) -> None:
    with pytest.raises(JobError, match="2 of these jobs are called matsuri"):
        next(rehearse([job, job], print))
