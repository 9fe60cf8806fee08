"""A job file becomes a job, survives the run directory, and its schema describes it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.spec import JobError, dump_job, job_from_json, job_schema, load_job, reveal
from trainer.spec.base import Spec
from trainer.spec.explain import models_below
from trainer.spec.job import Job
from trainer.spec.load import SECRETS

ROOT = Path(__file__).parents[3]


def test_japanese_text_and_secrets_survive_the_run_directory(write, monkeypatch):
    monkeypatch.setenv("MLFLOW_PW", "ひみつ")
    path = write(
        ("name: uta", 'name: uta\ntracking: {mlflow: "http://m:5000", username: me, password: "${env:MLFLOW_PW}"}')
    )
    job = load_job(path)
    text = dump_job(job)
    assert "祭り, 笛" in text
    assert "ひみつ" not in text
    assert json.loads(text)["tracking"]["password"] == "${env:MLFLOW_PW}"
    again = job_from_json(text)
    assert again == job
    assert again.validation.prompts[0].tags == "祭り, 笛"
    assert "MLFLOW_PW" not in repr(again)
    assert again.tracking.password is not None
    assert reveal(again.tracking.password) == "ひみつ"
    monkeypatch.delenv("MLFLOW_PW")
    with pytest.raises(JobError, match="MLFLOW_PW is not set"):
        reveal(again.tracking.password)


def test_a_resolved_job_says_what_songs_are_sampled_with(write):
    job = load_job(write(), ["validation.sampling.top_k=0"])
    told = json.loads(dump_job(job))["validation"]["sampling"]
    assert {name: value for name, value in told.items() if value is not None} == {
        "guidance": 3.0, "temperature": 1.0, "top_k": 0,
    }  # fmt: skip
    assert job_from_json(dump_job(job)) == job


def test_a_run_from_before_families_had_fields_of_their_own_goes_on(write):
    told = json.loads(dump_job(load_job(write(), ["model={family: ace_step, pretrained: random:tiny}"])))
    told["validation"]["sampling"] = {"guidance": 3.0, "temperature": 1.0, "top_k": 250}
    assert job_from_json(json.dumps(told)).validation.sampling.given == {
        "guidance": 3.0, "sampler": "euler", "steps": 60,
    }  # fmt: skip


def test_job_of_another_version_is_refused_by_field(write):
    text = dump_job(load_job(write())).replace('"steps"', '"stages"')
    with pytest.raises(JobError, match=r"train\.stages: unknown key"):
        job_from_json(text)


def test_environment_is_substituted_with_its_type(write, monkeypatch):
    monkeypatch.setenv("STEPS", "70")
    monkeypatch.setenv("BUCKET", "うた")
    job = load_job(
        write(
            ("steps: 100", "steps: ${env:STEPS}"),
            ("dataset: s3://music/datasets/ja", 'dataset: "s3://${env:BUCKET}/datasets/ja"'),
        )
    )
    assert job.train.steps == 70
    assert job.data.train[0].dataset == "s3://うた/datasets/ja"


def test_numbers_and_words_mean_what_they_look_like(write):
    path = write(("steps: 100", "steps: 100\n  optimizer: {lr: 1e-4, eps: .5e-8}"), ("name: uta", "name: no"))
    job = load_job(path, ["validation.prompts.0.tags=on"])
    assert (job.name, job.train.optimizer.lr, job.train.optimizer.eps) == ("no", 1e-4, 5e-9)
    assert job.validation.prompts[0].tags == "on"


def test_overrides_reach_items_and_make_sections(write):
    overrides = [
        "train.optimizer.lr=3e-4",
        "validation.prompts.0.seconds=12",
        "checkpoint.keep.last=5",
        "name=歌".replace("歌", "b"),
    ]
    job = load_job(write(), overrides)
    assert (job.train.optimizer.lr, job.validation.prompts[0].seconds, job.checkpoint.keep.last, job.name) == (
        3e-4,
        12,
        5,
        "b",
    )


def test_later_override_wins_and_takes_yaml(write):
    job = load_job(write(), ["train.steps=5", "train.steps=6", 'validation.prompts=[{tags: "雨"}, {tags: "雪"}]'])
    assert job.train.steps == 6
    assert [prompt.tags for prompt in job.validation.prompts] == ["雨", "雪"]


def test_relative_places_start_from_the_current_folder(write, tmp_path):
    (tmp_path / "曲").mkdir()
    prepare = "  prepare: {source: {type: folder, path: 曲}}\n  train: [{dataset: file://../ja}]"
    job = load_job(
        write(("store: s3://music", "store: file://./store"), ("  train: [{dataset: s3://music/datasets/ja}]", prepare))
    )
    assert job.store == f"file://{tmp_path}/store"
    assert job.data.train[0].dataset == f"file://{tmp_path.parent}/ja"
    assert job.data.prepare is not None
    assert job.data.prepare.source.path == f"{tmp_path}/曲"


def test_preset_fills_what_is_not_given(write):
    job = load_job(write(("{type: lora}", "{type: lora, preset: musicgen/all, rank: 4}")))
    assert job.method.type == "lora"
    assert (job.method.rank, job.method.alpha, job.method.targets[-2:]) == (4, 32, ("fc1", "fc2"))
    assert job_from_json(dump_job(job)) == job


def test_schema_describes_every_key():
    schema = job_schema()
    assert schema["properties"]["model"]["discriminator"]["propertyName"] == "family"
    assert schema["$defs"]["Train"]["properties"]["clip"]["description"] == "Largest gradient norm."
    assert schema["additionalProperties"] is False
    json.dumps(schema)


def test_secret_fields_are_known_to_the_reader():
    def secrets(model: type[Spec]) -> set[str]:
        return {name for name, info in model.model_fields.items() if "SecretStr" in str(info.annotation)}

    assert {name for model in models_below(Job) for name in secrets(model)} == {path[-1] for path in SECRETS}


def test_schema_needs_neither_torch_nor_numpy():
    code = (
        "import sys, trainer.spec, trainer.spec.families;"
        "print([name for name in ('torch', 'numpy', 'ray', 'mlflow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
