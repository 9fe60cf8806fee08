"""What cannot go together and what is not available yet, each by its field."""

import pytest

from trainer.spec import JobError, load_job
from trainer.spec.availability import unavailable
from trainer.spec.job import Job
from trainer.spec.rules import impossible_combinations
from trainer.spec.yaml import dotted

DESIGN = {
    "name": "songbloom-ja",
    "store": "s3://music",
    "model": {"family": "songbloom", "pretrained": "s3://models/songbloom-150s"},
    "method": {"type": "lora", "rank": 16, "alpha": 32},
    "data": {
        "train": [{"dataset": "s3://music/datasets/ja-singing", "weight": 1.0}],
        "validation": {"dataset": "s3://music/datasets/ja-held-out"},
        "prepare": {"source": {"type": "jacappella", "path": "s3://raw/jacappella"}, "lyrics": {"clean": "japanese"}},
    },
    "train": {
        "steps": 20000,
        "batch": {"seconds": 2400},
        "optimizer": {"name": "adamw", "lr": 1e-4, "weight_decay": 0.01},
        "schedule": {"name": "cosine", "warmup": 200},
        "strategy": "auto",
        "precision": "auto",
    },
    "checkpoint": {"every": 500, "keep": {"last": 2, "best": 2}},
    "validation": {
        "every": 500,
        "prompts": [
            {"lyrics": "[verse] さくら さくら", "style": "s3://music/prompts/a.flac", "seconds": 30, "seed": 1}
        ],
        "stop_if": ["vocals_lost", "silent"],
    },
    "tracking": {"mlflow": "http://mlflow:5000", "experiment": "songbloom-ja"},
    "cluster": {"backend": "kubernetes", "profile": "t4x4", "spot": True},
    "budget": {"hours": 24, "usd": 40},
    "retrain": {"cron": "0 3 * * 0", "timezone": "Asia/Tokyo", "when": "new-data"},
}


def test_the_job_of_the_design_is_right_and_lacks_only_what_comes_later():
    job = Job.model_validate(DESIGN)
    assert impossible_combinations(job) == []
    assert [dotted(path) for path, _ in unavailable(job)] == [
        "data.prepare.source.type", "data.prepare.lyrics.clean", "validation.stop_if",
        "budget.usd",
    ]  # fmt: skip


IMPOSSIBLE = [
    (["train.schedule.warmup=101"], "train.schedule.warmup: 101 is more than train.steps (100); write less"),
    (["train.batch.micro_seconds=90"], "train.batch.micro_seconds: 90 is more than the whole batch (60); write less"),
    (
        ["method={type: full}", "model.base_precision=int8"],
        "model.base_precision: int8 is for a frozen base, and method full trains it; write auto",
    ),
    (["model.codec.name=encodec"], "model.codec.name: builtin:pocket was made with pocket, not encodec; write pocket"),
    (
        ["model={family: heartmula, pretrained: random:tiny, codec: {name: dcae}}"],
        "model.codec.name: heartmula does not work with dcae; write heartcodec",
    ),
    (
        ["model={family: heartmula, pretrained: builtin:pocket}"],
        "model.pretrained: builtin:pocket is a musicgen, not heartmula; name other weights",
    ),
    (
        ["method.preset=fish-speech/r8a16"],
        "method.preset: fish-speech/r8a16 belongs to another family; musicgen has musicgen/attention or musicgen/all",
    ),
    (["method.preset=big"], "method.preset: big is not known; musicgen has musicgen/attention or musicgen/all"),
    (
        ["method.preset=musicgen/all", "method.targets=[q_proj]"],
        "method.targets: preset musicgen/all has its own targets; remove one of the two",
    ),
    (
        ["model={family: songbloom, pretrained: random:tiny}", "validation={}", "method.targets=[q_proj, to_qkv]"],
        "method.targets.1: to_qkv is refused: adapting the DiT that renders the sound destroyed the vocals from the "
        "first epochs; safe are q_proj and v_proj; to insist, write allow_harmful_targets: true",
    ),
    (
        ["model={family: songbloom, pretrained: random:tiny}", "validation={}", "method.targets=[to_q, to_kv]"],
        "method.targets.0: to_q is refused: SongBloom has to_qkv alone, and adapting the DiT that renders the sound "
        "destroyed the vocals from the first epochs; safe are q_proj and v_proj; to insist, write "
        "allow_harmful_targets: true",
    ),
    (
        [
            "model={family: ace_step, pretrained: random:tiny}",
            "validation={}",
            "method={type: lora, targets: [linear_q], train_also: [{modules: lyric_encoder}]}",
        ],
        "method.targets: all of them are in lyric_encoder, which train_also trains in full; add another",
    ),
    (
        ["method.pissa=true", "method.init=s3://music/adapter"],
        "method.pissa: the adapter starts from method.init already; remove one of the two",
    ),
    (
        ["validation.prompts.0.lyrics=さくら"],
        "validation.prompts.0.lyrics: musicgen does not listen to lyrics; remove it, or use tags",
    ),
    *(
        (
            ["model={family: fish_speech, pretrained: random:tiny}", f"validation.prompts=[{{{given}}}]"],
            f"validation.prompts.0.{path}: fish_speech hears a voice only together with what it says; add {missing}, "
            "or remove it",
        )
        for given, path, missing in (
            ("lyrics: 里, style: s3://music/a.flac", "style", "style_text"),
            ("lyrics: 里, style_text: さくら", "style_text", "style"),
        )
    ),
    (
        [
            "model={family: songbloom, pretrained: random:tiny}",
            "validation.prompts=[{style: s3://music/a.flac, style_text: さくら}]",
        ],
        "validation.prompts.0.style_text: songbloom does not listen to style_text; remove it, or use lyrics or style",
    ),
    (
        [
            "model={family: songbloom, pretrained: random:tiny}",
            "cluster={backend: kubernetes, profile: a100}",
            "validation.prompts=[{style: 'file:///様式.flac'}]",
        ],
        "validation.prompts.0.style: file:///様式.flac is on this machine, where kubernetes cannot see it; write s3:// "
        "or gs://",
    ),
    (
        ["model={family: fish_speech, pretrained: random:tiny}", "validation={sampling: {guidance: 3}}"],
        "validation.sampling.guidance: fish_speech does not listen to guidance; remove it, or use temperature, top_p, "
        "top_k or repetition_penalty",
    ),
    (
        ["model={family: ace_step, pretrained: random:tiny}", "validation.sampling={steps: 27, temperature: 0.9}"],
        "validation.sampling.temperature: ace_step does not listen to temperature; remove it, or use guidance, sampler "
        "or steps",
    ),
    (
        ["validation={stop_if: [silent]}"],
        "validation.stop_if: there is no audio to judge; add validation.prompts",
    ),
    (
        ["data.train=[{dataset: s3://a/歌}, {dataset: s3://a/歌/}]"],
        "data.train.1.dataset: is the same dataset as data.train.0; keep one and raise its weight",
    ),
    (
        ["data.validation={dataset: s3://music/datasets/ja}"],
        "data.validation.dataset: is also trained on, so the validation loss would mean nothing; write another one, or "
        "{fraction: 0.1}",
    ),
    (
        ["data.prepare={source: {type: demo, style: a}, min_seconds: 9, max_seconds: 3}"],
        "data.prepare.min_seconds: 9 is more than max_seconds (3); no song would be left; write less",
    ),
    (
        ["method.train_also=[{modules: lyric_encoder}]"],
        "method.train_also.0.modules: lyric_encoder is not known; musicgen can also train enc_to_dec_proj",
    ),
    (["kind=train-vq"], "kind: only songbloom has a VQ of its own to train; for musicgen write train"),
    (
        ["store=file://./store", "cluster={backend: kubernetes, profile: a100}"],
        "is on this machine, where kubernetes cannot see it; write s3:// or gs://",
    ),
    (
        ["retrain={cron: '0 3 * * 0'}"],
        "data.validation: retrain needs songs that stay the same, a dataset of its own; write {dataset: s3://…}",
    ),
    (
        ["retrain={cron: '0 3 * * 0'}", "validation={}"],
        "validation.prompts: retrain compares songs with the champion's; add a prompt",
    ),
    (
        ["retrain={cron: '0 3 * * 0'}", "method={type: full}"],
        "method.type: retrain goes on from the champion's adapter, and full has none; write lora",
    ),
    (
        ["retrain={cron: '0 3 * * 0'}", "method.pissa=true"],
        "method.pissa: retrain goes on from the champion's adapter, and PiSSA cannot; remove it",
    ),
    (["tracking.username=me"], "tracking: username and password go together; add password"),
]


@pytest.mark.parametrize(("overrides", "said"), IMPOSSIBLE, ids=[said[:50] for _, said in IMPOSSIBLE])
def test_impossible_combination_is_refused(write, overrides, said):
    with pytest.raises(JobError) as caught:
        load_job(write(), overrides)
    assert any(line.endswith(said) for line in str(caught.value).splitlines()), str(caught.value)


def test_sampling_without_effect_is_refused_at_its_place(write):
    path = write(("validation:\n", "validation:\n  sampling: {guidance: 2, steps: 60}   # 祭り\n"))
    with pytest.raises(JobError) as caught:
        load_job(path)
    cure = "musicgen does not listen to steps; remove it, or use guidance, temperature or top_k"
    assert f"job.yaml:13:34: validation.sampling.steps: {cure}" in str(caught.value)


def test_rules_hold_for_jobs_made_in_python_too():
    with pytest.raises(ValueError, match=r"train\.schedule\.warmup: 200 is more than"):
        Job.model_validate({**DESIGN, "train": {**DESIGN["train"], "steps": 100}})


def test_harmful_targets_can_be_insisted_on():
    method = {"type": "lora", "targets": ["to_qkv"], "allow_harmful_targets": True}
    assert impossible_combinations(Job.model_validate({**DESIGN, "method": method})) == []


LATER = [
    ("cluster={backend: existing, address: 'http://h:8265', profile: cpu, workers: 2}",
     "cluster.backend: backend existing is not available yet; write local or kubernetes"),
    ("data.prepare={source: {type: zip, path: s3://曲}}",
     "data.prepare.source.type: source zip is not available yet; write folder, jsonl, speakers, protos or demo"),
    ("data.prepare={source: {type: folder, path: s3://曲}}",
     "data.prepare.source.path: reading songs from a URL is not available yet; copy them to a folder of this machine"),
    ("data.prepare={source: {type: demo, style: a}, mode: on-the-fly}",
     "data.prepare.mode: on-the-fly is not available yet; write shards"),
    ("data.prepare={source: {type: demo, style: a}, lyrics: {clean: japanese}}",
     "data.prepare.lyrics.clean: cleaning lyrics is not available yet; clean the .lyrics files yourself and remove it"),
    ("data.prepare={source: {type: demo, style: a}, lyrics: {transcribe: {model: s3://w}}}",
     "data.prepare.lyrics.transcribe: transcription is not available yet; write .lyrics files yourself and remove it"),
    ("model={family: ace_step, pretrained: random:tiny, scheduled_sampling: {max_offset: 2}}",
     "model.scheduled_sampling: scheduled sampling is not available yet; remove it"),
    ("model.base_precision=int8", "model.base_precision: int8 is not available yet; write auto"),
    ("model.pretrained=hf://facebook/musicgen-small",
     "model.pretrained: downloading from Hugging Face is not available yet; download it yourself and write "
     "file:///path/to/it"),
    ("method.train_also=[{modules: enc_to_dec_proj, schedule: {name: constant}}]",
     "method.train_also.0.schedule: a schedule of its own is not available yet; remove it: train.schedule holds for "
     "all"),
    ("method.train_also=[{modules: enc_to_dec_proj, optimizer: {eps: 0.1}}]",
     "method.train_also.0.optimizer: anything but its own lr and weight_decay is not available yet; write the others "
     "as in train.optimizer"),
    ("validation.stop_if=[silent]", "validation.stop_if: stopping on bad audio is not available yet; remove it"),
    ("budget.usd=40", "budget.usd: enforcing a budget of money is not available yet; remove it"),
    ("budget.hours=4", "budget.hours: ending a run after so many hours is not available yet; remove it; backend "
     "kubernetes can"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "said"), LATER, ids=[said[:50] for _, said in LATER])
def test_what_comes_later_is_told_by_field_with_what_works_today(write, override, said):
    with pytest.raises(JobError) as caught:
        load_job(write(), [override])
    assert f"--set {override}: {said}" in str(caught.value).splitlines()


TODAY = [
    "method={type: full}", "method.dora=true", "method.rslora=true", "method.pissa=true", "method.lora_plus=16",
    "method.init=s3://music/adapter", "method.preset=musicgen/attention", "model.pretrained=random:tiny",
    "validation={}", "data.validation={dataset: s3://music/別}", "train.strategy=zero3", "train.precision=bf16",
]  # fmt: skip


@pytest.mark.parametrize("override", TODAY)
def test_what_works_today_loads(write, override):
    assert load_job(write(), [override]).name == "uta"
