"""What would spoil a night is told before the first step, each with its own words: one rank, without Ray."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter

from launcher.plan import plan
from launcher.runs import create_or_resume
from trainer import worker
from trainer.adapt import apply, save_adapter
from trainer.audio.write import save
from trainer.codecs import open_codec
from trainer.data.dataset import Dataset, Writer
from trainer.data.prepare import Tools, prepare_songs
from trainer.families import open_family
from trainer.spec import JobError, UtaforgeError, load_job
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
LORA = "{type: lora, rank: 2, alpha: 4}"
WITH_CODES = {"musicgen": "codes", "songbloom": "sketch", "heartmula": "codes", "fish_speech": "codes"}
OTHER_SIZES = {
    "musicgen": "codebooks 3, the model expects 4",
    "songbloom": r"latents \[3, T\], the model expects \[4, T\]",
    "heartmula": "codebooks 7, the model expects 8",
    "ace_step": r"latents \[7, 16, T\], the model expects \[8, 16, T\]",
    "fish_speech": "codebooks 7, the model expects 8",
}
MISSING = {
    "musicgen": "encodec",
    "songbloom": "vq",
    "heartmula": "heartcodec",
    "ace_step": "dcae",
    "fish_speech": "firefly",
}
HARMFUL = [(name, next(iter(spec.harmful_targets))) for name, spec in FAMILIES.items() if spec.harmful_targets]


def model(family: str, pretrained: str = "random:tiny") -> Model:
    return TypeAdapter(Model).validate_python({"family": family, "pretrained": pretrained})


def prepare(folder: Path, family: str) -> Dataset:
    """A dataset in ``folder`` for the tiny network of a family."""
    (folder / "歌").mkdir()
    for i in range(2):
        wave = 0.3 * np.sin(np.arange(2 * 16_000) * 0.1 * (i + 1))
        save(folder / "歌" / f"さくら{i}.wav", wave[None].astype(np.float32), 16_000, "wav")
    tiny = model(family)
    spec = Prepare.model_validate({"source": {"type": "folder", "path": str(folder / "歌")}})
    return prepare_songs(f"file://{folder}/資料", Tools(spec, open_codec(tiny), open_family(tiny), family))


def write_again(dataset: Dataset, name: str, change: Callable[[np.ndarray], np.ndarray], **format: Any) -> None:
    """A version of ``dataset`` with another array ``name`` and another format, by the same codec."""
    songs = [dataset.song(song) for song in dataset.songs.ids]
    songs = [replace(song, arrays={**song.arrays, name: change(song.arrays[name])}) for song in songs]
    dtypes = {**dataset.format.dtypes, name: songs[0].arrays[name].dtype.name}
    writer = Writer(dataset.store, replace(dataset.format, dtypes=dtypes, **format))
    writer.add(songs)
    writer.commit()


def failure(folder: Path, model: str, method: str = LORA) -> str:
    """What a run that must not train says; it has made no step."""
    path = folder / "hanabi.yaml"
    path.write_text(JOB.format(folder=folder, model=model, method=method), encoding="utf-8")
    job = load_job(str(path))
    tiny = job.model.model_copy(update={"pretrained": "random:tiny"})  # whose plan fits every machine
    run = create_or_resume(job, plan(job.model_copy(update={"model": tiny})).as_json()).run
    assert worker.main([run.url]) != 0
    told = json.loads(run.store.get("failure.json"))
    assert told["cure"]
    assert not run.store.exists("metrics.jsonl")
    return told["problem"]


def test_a_checkpoint_of_another_network(tmp_path: Path) -> None:
    prepare(tmp_path, "musicgen")
    family = open_family(model("musicgen"))
    release = tmp_path / "別の重み"
    family.save(family.network(), release, {})
    config = json.loads((release / "config.json").read_text())
    config["decoder"]["num_hidden_layers"] += 1
    (release / "config.json").write_text(json.dumps(config))
    told = failure(tmp_path, f'{{family: musicgen, pretrained: "file://{release}", codec: {{name: pocket}}}}')
    assert f"the weights at file://{release} are not those of this network" in told
    assert "missing: decoder.model.decoder.layers.2." in told


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_another_shape_and_those_too_many_are_told_by_name(name: str, tmp_path: Path) -> None:
    family = open_family(model(name))
    network = family.network()
    parameter = [key for key, value in network.named_parameters() if value.ndim == 2][-1]
    family.save(network, tmp_path / "別の重み", {parameter: torch.zeros(3, 5), "歌.weight": torch.zeros(1)})
    with pytest.raises(UtaforgeError, match=r"別の重み.* are not those of this network") as caught:
        open_family(model(name, f"file://{tmp_path}/別の重み")).network()
    assert f"{parameter} is (3, 5), should be (" in str(caught.value)
    assert "unexpected: 歌.weight" in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_codes_or_latents_of_another_size(family: str, tmp_path: Path) -> None:
    dataset = prepare(tmp_path, family)
    if shape := dataset.format.latent_shape:
        write_again(dataset, "latents", lambda latents: latents[:-1], latent_shape=(shape[0] - 1, *shape[1:]))
    else:
        write_again(dataset, "codes", lambda codes: codes[:-1], codebooks=dataset.format.codebooks - 1)
    told = failure(tmp_path, f'{{family: {family}, pretrained: "random:tiny"}}')
    assert re.search(f"資料 was prepared with {OTHER_SIZES[family]}", told), told


@pytest.mark.parametrize("family", WITH_CODES)
def test_an_id_out_of_range_names_shard_and_song(family: str, tmp_path: Path) -> None:
    dataset = prepare(tmp_path, family)
    known = dataset.format.vocabulary

    def with_a_higher_one(codes: np.ndarray) -> np.ndarray:
        codes = codes.astype(np.uint16)
        codes[..., 3] = known + 44
        return codes

    write_again(dataset, WITH_CODES[family], with_a_higher_one, vocabulary=known + 45)
    told = failure(tmp_path, f'{{family: {family}, pretrained: "random:tiny"}}')
    assert "song さくら0 in shards/" in told
    assert f"holds code {known + 44}, the model knows 0 to {known - 1}" in told


@pytest.mark.parametrize(("family", "target"), HARMFUL, ids=[family for family, _ in HARMFUL])
def test_a_harmful_target_is_refused_by_name(family: str, target: str, tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        failure(tmp_path, f'{{family: {family}, pretrained: "random:tiny"}}', f"{{type: lora, targets: ['{target}']}}")
    reason = FAMILIES[family].harmful_targets[target]
    assert f"method.targets.0: {target} is refused: {reason}" in str(caught.value)


def test_an_adapter_of_another_rank_to_continue_from(tmp_path: Path) -> None:
    prepare(tmp_path, "musicgen")
    network = open_family(model("musicgen"))
    save_adapter(apply(network.network(), Lora(type="lora", rank=4), FAMILIES["musicgen"]), tmp_path / "前の重み")
    url = f"file://{tmp_path}/前の重み"
    tiny = '{family: musicgen, pretrained: "random:tiny"}'
    told = failure(tmp_path, tiny, f'{{type: lora, rank: 2, alpha: 4, init: "{url}"}}')
    assert f"the adapter in {url} has r = 4, the job's method asks for 2" in told


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_codec_that_are_missing(family: str, tmp_path: Path) -> None:
    prepare(tmp_path, family)
    place = f"model.codec.weights.{MISSING[family]}"
    assert f"{place} is not given" in failure(tmp_path, f'{{family: {family}, pretrained: "random:full"}}')
    nowhere = (
        f"{{family: {family}, pretrained: 'random:tiny', codec: {{weights: {{{MISSING[family]}: 'file:///無い'}}}}}}"
    )
    with pytest.raises(JobError, match=rf"hanabi\.yaml:3:.*{place}: there is nothing at /無い"):
        failure(tmp_path, nowhere)
