"""Everything that can be wrong with a job file is said at its line and column, in words that say what to write."""

import pytest

from trainer.spec import JobError, load_job


def faults(path: str, *overrides: str) -> list[str]:
    with pytest.raises(JobError) as caught:
        load_job(path, overrides)
    return str(caught.value).splitlines()


LONG = 64 * "x"
SCHEMA = [
    # what is replaced, by what, what is said
    (("  steps: 100\n", ""), "job.yaml:9:1: train.steps: is missing; write steps: <a whole number>"),
    (("name: uta\n", ""), "job.yaml:1:1: name: is missing; write name: <text>"),
    (("steps:", "stepps:"), "job.yaml:10:3: train.stepps: unknown key; did you mean steps?"),
    (
        ("steps: 100", "steps: 100\n  lr: 1e-4"),
        "job.yaml:11:3: train.lr: unknown key; did you mean train.optimizer.lr?",
    ),
    (
        ("  family", "  shift: 3\n  family"),
        "job.yaml:4:3: model.shift: musicgen has no such key (it belongs to ace_step); remove it",
    ),
    (
        ("name: uta", "name: uta\ncluster: {backend: local, spot: true}"),
        "job.yaml:2:27: cluster.spot: local has no such key (it belongs to kubernetes, cloud); remove it",
    ),
    (
        ("name: uta", "name: uta\ncluster: {backend: kubernetes, profile: t4x4, image: 'uta:歌'}"),
        "job.yaml:2:54: cluster.image: 'uta:歌' is not an image; write it like ghcr.io/you/utaforge:1.0",
    ),
    (
        ("name: uta", "name: uta\ncluster: {backend: kubernetes, profile: ../t4x4}"),
        "job.yaml:2:41: cluster.profile: '../t4x4' is not a profile; write a name like t4x4, not a file",
    ),
    (
        ("name: uta", f"name: uta\ncluster: {{backend: kubernetes, profile: {LONG}}}"),
        f"job.yaml:2:41: cluster.profile: '{LONG}' has 64 characters; a Kubernetes label, which it becomes, has 63",
    ),
    (
        (
            "name: uta",
            f"name: uta\ncluster: {{backend: kubernetes, profile: cpu, queue: {{kind: kueue, name: {LONG}}}}}",
        ),
        f"job.yaml:2:73: cluster.queue.name: '{LONG}' has 64 characters; a Kubernetes label, which it becomes, has 63",
    ),
    (
        ("name: uta", "name: uta\nカラオケ: 1"),
        "job.yaml:2:1: カラオケ: unknown key; known here: kind, name, store, model, method, data, train, checkpoint, "
        "validation, tracking, cluster, budget, retrain",
    ),
    (
        ("family: musicgen", "family: musigen"),
        'job.yaml:4:11: model.family: "musigen" is not one of musicgen, songbloom, heartmula, ace_step, fish_speech; '
        "did you mean musicgen?",
    ),
    (
        ("  family: musicgen\n", ""),
        "job.yaml:3:1: model.family: is missing; write one of musicgen, songbloom, heartmula, ace_step, fish_speech",
    ),
    (("{type: lora}", "lora"), 'job.yaml:6:9: method: must be a mapping, like {type: …}; got "lora"'),
    (
        ("batch: {seconds: 60}", "batch: 60"),
        "job.yaml:11:10: train.batch: must be a mapping, like {seconds: …} or {songs: …}; got 60",
    ),
    (
        ("{seconds: 60}", "{seconds: 60, songs: 4}"),
        "job.yaml:11:11: train.batch.seconds: does not go with songs; keep one of the two",
    ),
    (("steps: 100", "steps: many"), 'job.yaml:10:10: train.steps: must be a whole number; got "many"'),
    (("steps: 100", "steps: 0.5"), "job.yaml:10:10: train.steps: must be a whole number; got 0.5"),
    (("steps: 100", "steps: true"), "job.yaml:10:10: train.steps: must be a whole number; got true"),
    (("steps: 100", "steps: -1"), "job.yaml:10:10: train.steps: must be at least 1; got -1"),
    (("steps: 100", "steps:"), "job.yaml:10:9: train.steps: must be a whole number; got null"),
    (
        ("steps: 100", "steps: 0100"),
        'job.yaml:10:10: train.steps: 0100 is octal to some, decimal to others; write 100, or "0100" for text',
    ),
    (("{seconds: 60}", "{seconds: 0}"), "job.yaml:11:20: train.batch.seconds: must be more than 0; got 0"),
    (("name: uta", "name: 12"), 'job.yaml:1:7: name: must be text; put it in quotes: "12"'),
    (
        ("name: uta", "name: 歌"),
        "job.yaml:1:7: name: '歌' must be 1 to 36 characters of a-z, 0-9 and '-', not beginning or ending with '-' "
        "(it becomes part of Kubernetes object names)",
    ),
    (
        ("steps: 100", "steps: 100\n  gradient_checkpointing: yes"),
        'job.yaml:11:27: train.gradient_checkpointing: must be true or false; got "yes"',
    ),
    (
        ("steps: 100", "steps: 100\n  precision: fp61"),
        'job.yaml:11:14: train.precision: "fp61" is not one of auto, fp32, bf16, fp16; did you mean fp16?',
    ),
    (
        ("steps: 100", "steps: 100\n  optimizer: {betas: [0.9]}"),
        "job.yaml:11:22: train.optimizer.betas: has too few items; got [0.9]",
    ),
    (
        ("  train: [{dataset: s3://music/datasets/ja}]", "  train: []"),
        "job.yaml:8:10: data.train: must have at least 1 item(s); got []",
    ),
    (
        ("store: s3://music", "store: file://music"),
        "job.yaml:2:8: store: 'file://music' is not a URL that works here; write s3://bucket/prefix, "
        "gs://bucket/prefix, file:///absolute/path or file://./relative/path",
    ),
    (
        ("builtin:pocket", "random:小"),
        "job.yaml:5:15: model.pretrained: 'random:小' is not a URL that works here; write s3://bucket/prefix, "
        "gs://bucket/prefix, file:///absolute/path, file://./relative/path, hf://org/repo, random:tiny or "
        "builtin:pocket",
    ),
    (
        ("name: uta", 'name: uta\ntracking: {mlflow: "ftp://x"}'),
        "job.yaml:2:20: tracking.mlflow: 'ftp://x' is not an address of MLflow; write http://HOST:5000 or "
        "sqlite:///path/to/mlflow.db",
    ),
    (
        ("name: uta", 'name: uta\nretrain: {cron: "0 3 * *"}'),
        "job.yaml:2:17: retrain.cron: '0 3 * *' is not a cron schedule; write five fields: minute hour day month "
        'weekday, like "0 3 * * 0"',
    ),
    (
        ("seconds: 8", "seconds: -8"),
        "job.yaml:14:32: validation.prompts.0.seconds: must be more than 0; got -8",
    ),
    (
        ("  prompts:", "  stop_if: [vocals_lots]\n  prompts:"),
        'job.yaml:13:13: validation.stop_if.0: "vocals_lots" is not one of vocals_lost, silent, looping; '
        "did you mean vocals_lost?",
    ),
    (
        ("steps: 100", "steps: 100\n  steps: 10"),
        "job.yaml:11:3: train.steps: is given twice, first in line 10; keep one of them",
    ),
    (
        ("name: uta", "name: uta\n<<: {a: 1}"),
        "job.yaml:2:1: keys are plain words; merge keys (<<) are not used in jobs",
    ),
    (
        ("steps: 100", "steps: ${env:UTA_UNSET}"),
        "job.yaml:10:10: train.steps: the environment variable UTA_UNSET is not set; set it, or write the value here",
    ),
    (
        ("dataset: s3://music/datasets/ja", 'dataset: "s3://${BUCKET}/ja"'),
        "job.yaml:8:21: data.train.0.dataset: ${BUCKET} means nothing here; the one substitution is ${env:NAME}",
    ),
    (
        ("builtin:pocket", "file:///there/is/none"),
        "job.yaml:5:15: model.pretrained: there is nothing at /there/is/none; correct the path",
    ),
]


@pytest.mark.parametrize(("replacement", "said"), SCHEMA, ids=[said.split(": ", 1)[1][:50] for _, said in SCHEMA])
def test_fault_is_told_with_place_and_cure(write, replacement, said):
    assert said in faults(write(replacement))


def test_a_style_that_is_not_there_is_told(write):
    family = ("family: musicgen\n  pretrained: builtin:pocket", "family: songbloom\n  pretrained: random:tiny")
    path = write(family, ('{tags: "祭り, 笛", seconds: 8}', "{lyrics: s a, style: 'file:///声.wav'}"))
    assert faults(path) == ["job.yaml:14:28: validation.prompts.0.style: there is nothing at /声.wav; correct the path"]


def test_all_faults_are_told_at_once_in_the_order_of_the_file(write):
    path = write(
        ("name: uta", "name: U"),
        ("family: musicgen", "family: musicgen\n  family: musicgen"),
        ("steps: 100", "steps: x\n  schedule: {warmup: 500}"),
        ("validation:", "budget: {hours: 3}\nvalidation:"),
        ("seconds: 8", 'seconds: 8, lyrics: "さくら"'),
    )
    told = faults(path, "train.clip=0")
    assert [line.split(": ")[0] for line in told] == [
        "job.yaml:1:7", "job.yaml:5:3", "job.yaml:11:10", "job.yaml:14:17", "job.yaml:17:43", "--set train.clip=0",
    ]  # fmt: skip


def test_combinations_with_a_broken_field_are_left_until_it_is_mended(write):
    path = write(("steps: 100", "steps: x\n  schedule: {warmup: 500}"))
    assert len(faults(path)) == 1
    assert "is more than train.steps" in faults(path, "train.steps=10")[0]


FILES = [
    ("", "job.yaml:1:1: the file is empty"),
    ("# 歌\n", "job.yaml:1:1: the file is empty"),
    ("- さくら\n", "job.yaml:1:1: a job is a mapping (key: value)"),
    ("name: [a\n", "job.yaml:2:1: expected ',' or ']', but got '<stream end>'"),
    ("a: &x 1\nb: *x\n", "job.yaml:1:4: anchors (&x) and aliases (*x) are not used in jobs"),
    ("a: !!python/name:os.system x\n", "job.yaml:1:4: tags (!x) are not used in jobs"),
    ("a: b\n\tc: d\n", "job.yaml:2:1: found character '\\t' that cannot start any token"),
    ("a: \0\n", "job.yaml: not YAML: unacceptable character #x0000: special characters are not allowed"),
    ("[" * 1500, "job.yaml: lists and mappings are nested too deeply"),
]


@pytest.mark.parametrize(("text", "said"), FILES, ids=[said[:40] for _, said in FILES])
def test_file_that_is_no_job_is_refused(write, text, said):
    assert faults(write(text=text))[0] == said


def test_syntax_error_says_what_to_quote(write):
    (_, cure) = faults(write(text="a: [{lyrics: [verse] さくら}]"))
    assert cure == '  → text that contains [ ] { } : or # needs quotes: "[verse] さくら"'
    (_, cure) = faults(write(text="tracking: {password: ${env:X}}"))
    assert cure == '  → inside {…} and […], ${env:NAME} needs quotes: "${env:NAME}"'


def test_missing_file_folder_and_other_encodings_are_told(tmp_path):
    assert faults(str(tmp_path / "無い.yaml"))[0] == f"{tmp_path}/無い.yaml: there is no such file"
    assert faults(str(tmp_path))[0] == f"{tmp_path}: cannot be read: Is a directory"
    (tmp_path / "sjis.yaml").write_bytes("name: さくら".encode("shift-jis"))
    assert faults(str(tmp_path / "sjis.yaml"))[0] == f"{tmp_path}/sjis.yaml: the file is not UTF-8 text (byte 6)"


def test_passwords_are_never_repeated(write):
    path = write(
        ("name: uta", 'name: uta\ntracking: {mlflow: "http://me:hunter2@host", username: me, password: hunter2}'),
        ("store: s3://music", "store: s3://key:hunter2@music"),
    )
    told = faults(path)
    assert "hunter2" not in "\n".join(told)
    assert [line.split(": ")[1] for line in told] == ["tracking.mlflow", "tracking.password", "store"]
    assert told[1] == (
        "job.yaml:2:70: tracking.password: a secret is given by reference only: write ${env:NAME} and set NAME in the "
        "environment"
    )


OVERRIDES = [
    ("train.steps", "--set train.steps: not of the form path=value"),
    ("=3", "--set =3: not of the form path=value"),
    ("train.steps=many", '--set train.steps=many: train.steps: must be a whole number; got "many"'),
    ("train.lr=1e-4", "--set train.lr=1e-4: train.lr: unknown key; did you mean train.optimizer.lr?"),
    ("name.x=1", "--set name.x=1: name.x: 'x' would stand inside of a single value"),
    (
        "validation.prompts.3.seconds=1",
        "--set validation.prompts.3.seconds=1: validation.prompts.3.seconds: '3' is no item of a list of 1",
    ),
    (
        "validation.prompts.0.lyrics=さくら",
        "--set validation.prompts.0.lyrics=さくら: validation.prompts.0.lyrics: musicgen does not listen to lyrics; "
        "remove it, or use tags",
    ),
    ("name=[", "--set name=[: expected the node content, but found '<stream end>'"),
]


@pytest.mark.parametrize(("override", "said"), OVERRIDES, ids=[override for override, _ in OVERRIDES])
def test_fault_of_an_override_names_the_override(write, override, said):
    assert faults(write(), override)[0] == said
