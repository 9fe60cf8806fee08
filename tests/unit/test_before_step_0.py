"""What would spoil a night is told before the first step, each with its own words: one rank, without Ray."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter

from launcher.plan import plan
from launcher.runs import create_or_resume
from trainer import worker
from trainer.adapt import apply, save_adapter
from trainer.audio.write import save
from trainer.codecs import open_codec
from trainer.data.dataset import Dataset, Writer
from trainer.data.prepare import Tools, prepare_songs
from trainer.data.shards import Song
from trainer.families import open_family
from trainer.spec import JobError, load_job
from trainer.spec.data import Prepare
from trainer.spec.families import FAMILIES, Model
from trainer.spec.model import Lora

JOB = """\
name: hanabi
store: file://{folder}
model: {model}
method: {method}
data: {{train: [{{dataset: "file://{folder}/資料"}}], validation: {{fraction: 0.5, by: song}}}}
train: {{steps: 2, batch: {{seconds: 10}}}}
cluster: {{backend: local, workers: 1}}
"""
TINY = '{family: musicgen, pretrained: "random:tiny", segment_seconds: 5}'
LORA = "{type: lora, rank: 2, alpha: 4}"


@pytest.fixture
def songs(tmp_path: Path) -> Path:
    """A folder with a dataset for the tiny MusicGen in it."""
    (tmp_path / "歌").mkdir()
    for i in range(2):
        wave = 0.3 * np.sin(np.arange(2 * 16_000) * 0.1 * (i + 1))
        save(tmp_path / "歌" / f"さくら{i}.wav", wave[None].astype(np.float32), 16_000, "wav")
    model = TypeAdapter(Model).validate_python({"family": "musicgen", "pretrained": "random:tiny"})
    spec = Prepare.model_validate({"source": {"type": "folder", "path": str(tmp_path / "歌")}})
    prepare_songs(f"file://{tmp_path}/資料", Tools(spec, open_codec(model), open_family(model), "musicgen"))
    return tmp_path


def failure(folder: Path, model: str = TINY, method: str = LORA) -> str:
    """What a run that must not train says; it has made no step."""
    path = folder / "hanabi.yaml"
    path.write_text(JOB.format(folder=folder, model=model, method=method), encoding="utf-8")
    job = load_job(str(path))
    run = create_or_resume(job, plan(job).as_json()).run
    assert worker.main([run.url]) != 0
    told = json.loads(run.store.get("failure.json"))
    assert told["cure"]
    assert not run.store.exists("metrics.jsonl")
    return told["problem"]


def test_a_checkpoint_of_another_network(songs: Path) -> None:
    family = open_family(TypeAdapter(Model).validate_python({"family": "musicgen", "pretrained": "random:tiny"}))
    release = songs / "別の重み"
    family.save(family.network(), release, {})
    config = json.loads((release / "config.json").read_text())
    config["decoder"]["num_hidden_layers"] += 1
    (release / "config.json").write_text(json.dumps(config))
    told = failure(songs, f'{{family: musicgen, pretrained: "file://{release}", codec: {{name: pocket}}}}')
    assert f"the weights at file://{release} are not those of this network" in told
    assert "missing: decoder.model.decoder.layers.2." in told


def test_a_codebook_of_another_size(songs: Path) -> None:
    told = failure(songs, '{family: fish_speech, pretrained: "random:tiny"}')
    assert "資料 was prepared with codebooks 4, the model expects " in told


def test_an_id_out_of_range_names_shard_and_song(songs: Path) -> None:
    dataset = Dataset.open(f"file://{songs}/資料")
    dtypes = {**dataset.format.dtypes, "codes": "uint16"}
    writer = Writer(dataset.store, replace(dataset.format, vocabulary=512, dtypes=dtypes))
    writer.add([with_code(dataset.song(name), 300) for name in dataset.songs.ids])
    writer.commit()
    told = failure(songs)
    assert "song さくら0 in shards/" in told
    assert "holds code 300, the model knows 0 to 255" in told


def test_a_harmful_target_is_refused_by_name(songs: Path) -> None:
    with pytest.raises(JobError, match=r"to_qkv.*destroyed the vocals"):
        failure(songs, '{family: songbloom, pretrained: "random:tiny"}', "{type: lora, targets: [to_qkv]}")


def test_an_adapter_of_another_rank_to_continue_from(songs: Path) -> None:
    network = open_family(TypeAdapter(Model).validate_python({"family": "musicgen", "pretrained": "random:tiny"}))
    save_adapter(apply(network.network(), Lora(type="lora", rank=4), FAMILIES["musicgen"]), songs / "前の重み")
    url = f"file://{songs}/前の重み"
    told = failure(songs, method=f'{{type: lora, rank: 2, alpha: 4, init: "{url}"}}')
    assert f"the adapter in {url} has r = 4, the job's method asks for 2" in told


def test_weights_of_a_codec_that_are_missing(songs: Path) -> None:
    model = f'{{family: ace_step, pretrained: "random:tiny", codec: {{weights: {{vocoder: "file://{songs}/歌"}}}}}}'
    assert "model.codec.weights.dcae" in failure(songs, model)
    nowhere = "{family: ace_step, pretrained: 'random:tiny', codec: {weights: {dcae: 'file:///無い'}}}"
    with pytest.raises(JobError, match=r"hanabi\.yaml:3:.*model\.codec\.weights\.dcae: there is nothing at /無い"):
        failure(songs, nowhere)


def with_code(song: Song, code: int) -> Song:
    codes = song.arrays["codes"].astype(np.uint16)
    codes[0, 3] = code
    return replace(song, arrays={**song.arrays, "codes": codes})
