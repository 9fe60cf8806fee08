"""``utaforge doctor --model``: weights and songs that belong together pass, others are told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch.nn import functional
from transformers.models.musicgen import modeling_musicgen

from launcher.cli import run
from tests.unit.families.conftest import fish_speech_release
from tests.unit.families.test_every_family import MODELS
from tests.unit.families.test_every_family import model as tiny
from trainer import selftest
from trainer.audio.write import save
from trainer.codecs import open_codec
from trainer.data.dataset import Dataset
from trainer.data.prepare import Tools, prepare_songs
from trainer.families import open_family
from trainer.families.base import Autoregressive, Example
from trainer.families.fish_speech import network as fish_speech
from trainer.families.heartmula import llama as heartmula
from trainer.families.songbloom import transformer as songbloom
from trainer.selftest import causality, greedy_generation
from trainer.spec.data import Prepare
from trainer.spec.families import FAMILIES, Model

AUTOREGRESSIVE = ("fish_speech", "heartmula", "musicgen", "songbloom")
SHARPER = 8
"""By how much the weights of a tiny network's layers are larger, so that attention is heard."""
CPU = torch.device("cpu")
JOB = """\
name: koto
store: file:///箏
model: {family: ace_step, pretrained: "s3://箏/重み", ssl_features: true, lyric_vocabulary: "s3://箏/vocab.json"}
method: {type: lora}
data: {train: [{dataset: "s3://箏/songs"}]}
train: {steps: 10, batch: {seconds: 30}}
"""
LYRICS = "[verse] s a k u r a . s a k u r a さくら"


def model(family: str) -> Model:
    return TypeAdapter(Model).validate_python({"family": family, "pretrained": "random:tiny"})


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """The URL of a dataset for a tiny family, made by its own codec."""
    place = tmp_path_factory.mktemp("資料")
    (place / "歌").mkdir()
    for i in range(2):
        wave = 0.3 * np.sin(np.arange(3 * 16_000) * 0.1 * (i + 1))
        save(place / "歌" / f"さくら{i}.wav", wave[None].astype(np.float32), 16_000, "wav")
        (place / "歌" / f"さくら{i}.lyrics").write_text(LYRICS, encoding="utf-8")
        (place / "歌" / f"さくら{i}.txt").write_text("琴, female vocal", encoding="utf-8")

    def dataset(family: str) -> str:
        url, its = f"file://{place}/{family}", model(family)
        if not Path(url.removeprefix("file://")).exists():
            spec = Prepare.model_validate({"source": {"type": "folder", "path": str(place / "歌")}})
            prepare_songs(url, Tools(spec, open_codec(its), open_family(its), family))
        return url

    return dataset


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_songs_that_belong_together_pass(
    family: str, datasets: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert selftest.main(["random:tiny", "--dataset", datasets(family)]) == 0
    told = capfd.readouterr().out.splitlines()
    generation = ["greedy generation", "causality"] if family in AUTOREGRESSIVE else ["greedy generation, causality"]
    assert [line.split(":")[0] for line in told] == [
        f"ok   {name}" for name in ("songs", "weights", "loss", *generation, "untrained adapter", "merged adapter")
    ]
    assert (family in AUTOREGRESSIVE) == ("ace_step is not autoregressive" not in "".join(told))


@pytest.mark.parametrize("name", MODELS)
def test_weights_alone_tell_what_they_are_and_are_tested_on_songs_that_are_made_up(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, family = tmp_path / "公開", open_family(tiny(name))
    family.save(family.network(), folder, {})
    if name.startswith("fish_speech"):
        fish_speech_release(folder, MODELS[name]["version"])
    assert selftest.main([f"file://{folder}"]) == 0
    told = capfd.readouterr().out
    assert f"parameters of {name.split()[0]}, every key" in told
    assert "made up: no id of a dataset was looked at" in told


def test_a_job_tells_what_weights_do_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "箏.yaml"
    job.write_text(JOB, encoding="utf-8")
    assert selftest.main(["random:tiny", "--job", str(job)]) == 0
    assert "parameters of ace_step, every key" in capfd.readouterr().out
    assert selftest.main(["random:tiny"]) == 1
    assert "random:tiny may be of any family\n  → name a job of that family: --job JOB" in capfd.readouterr().err


def test_what_is_no_release_is_told_with_its_place_and_cure(
    tmp_path: Path, datasets: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "空").mkdir()
    assert selftest.main([f"file://{tmp_path}/空"]) == 1
    told = capfd.readouterr().err
    assert f"file://{tmp_path}/空 is no release of musicgen, songbloom" in told
    assert "name the folder of an official release" in told and "--job JOB" in told
    assert selftest.main(["歌/重み"]) == 3
    assert "'歌/重み' is not a store" in capfd.readouterr().err
    songs = datasets("ace_step")
    assert selftest.main(["builtin:pocket", "--dataset", songs]) == 4
    assert "was prepared for ace_step, the weights at builtin:pocket are of musicgen" in capfd.readouterr().err


@pytest.mark.parametrize("family", AUTOREGRESSIVE)
@torch.no_grad()
def test_predictions_cost_what_training_says(family: str, datasets: Callable[[str], str]) -> None:
    room, songs = open_family(model(family)), Dataset.open(datasets(family))
    assert isinstance(room, Autoregressive)
    network = room.network().eval()
    batch = room.collate(selftest._examples(songs)[:1], training=False)
    cost = sum(functional.cross_entropy(p.logits, p.ids, reduction="sum") for p in room.predictions(network, batch))
    if family == "songbloom":
        (end,) = _last_prediction(network, batch)
        cost += functional.cross_entropy(end, torch.tensor(network.config.eos))
    sums = room.sums(network, batch)
    assert float(cost) == pytest.approx(
        sum(float(sums[t]) for t in ("ce", "base", "semantic", "ce0", "ce_k") if t in sums)
    )


@pytest.mark.parametrize("family", AUTOREGRESSIVE)
def test_a_network_without_its_causal_mask_fails(
    family: str, datasets: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    room, network, songs, example = _sharp(family, datasets(family))
    attention = functional.scaled_dot_product_attention

    def unmasked(*given: Any, **options: Any) -> torch.Tensor:
        return attention(*given[:3], enable_gqa=options.get("enable_gqa", False), scale=options.get("scale"))

    with monkeypatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", unmasked)
        assert not causality(room, network, example, songs.format.timed, CPU).ok
    assert causality(room, network, example, songs.format.timed, CPU).ok


@pytest.mark.parametrize("family", AUTOREGRESSIVE)
def test_a_cache_that_is_a_position_off_fails(
    family: str, datasets: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    room, network, songs, example = _sharp(family, datasets(family))
    assert greedy_generation(room, network, example, CPU).ok
    _shift_cached_positions(family, monkeypatch)
    assert not greedy_generation(room, network, example, CPU).ok
    assert causality(room, network, example, songs.format.timed, CPU).ok


def test_an_adapter_that_does_not_merge_fails(
    datasets: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def careless(network: torch.nn.Module, *_: object) -> torch.nn.Module:
        adapted = apply(network, *_)
        adapted.merge_and_unload = lambda: adapted.unload()
        return adapted

    apply = selftest.apply
    monkeypatch.setattr(selftest, "apply", careless)
    assert selftest.main(["random:tiny", "--dataset", datasets("musicgen")]) == 1
    assert "FAIL merged adapter" in capfd.readouterr().out


def test_what_cannot_be_used_is_told_with_its_cure(
    datasets: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    songs = datasets("musicgen")
    assert selftest.main(["file:///無い", "--dataset", songs]) == 1
    assert "there is no /無い\n  → name the folder" in capfd.readouterr().err
    assert selftest.main(["random:tiny", "--dataset", f"{songs}-無い"]) == 4
    assert "musicgen-無い" in capfd.readouterr().err


def test_the_doctor_tells_its_self_tests_as_json(
    datasets: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    songs = datasets("ace_step")
    assert selftest.main(["random:tiny", "--dataset", songs, "--json"]) == 0
    checks = json.loads(capfd.readouterr().out)
    assert [check["name"] for check in checks][:3] == ["songs", "weights", "loss"]
    assert all(check["ok"] is True and check["found"] for check in checks)
    assert run(["doctor", "--dataset", songs]) == 1
    assert "--dataset goes with --model" in capfd.readouterr().err
    assert run(["doctor", "--model", "file:///無い", "--dataset", songs, "--json"]) == 1
    told = capfd.readouterr()
    assert json.loads(told.out) == []
    assert "there is no /無い" in told.err


def _sharp(family: str, url: str) -> tuple[Autoregressive, torch.nn.Module, Dataset, Example]:
    """A tiny network in which every position tells, as in a trained one, and a song for it."""
    room, songs = open_family(model(family)), Dataset.open(url)
    assert isinstance(room, Autoregressive)
    network = room.network().eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "layers." in name and parameter.ndim == 2:
                parameter *= SHARPER
    return room, network, songs, selftest._examples(songs)[0]


def _last_prediction(network: Any, batch: Any) -> torch.Tensor:
    given = batch.tensors
    prefix = network.condition_provider(given["lyrics"], given["prompt"])
    return network.skeleton_classifier(network.plan(prefix, given["sketch"], given["latents"]).states[:, -1])


def _shift_cached_positions(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows the prompt stands a position further than it does in training."""
    if family == "musicgen":
        embedding = modeling_musicgen.MusicgenSinusoidalPositionalEmbedding
        placed = embedding.forward
        monkeypatch.setattr(
            embedding, "forward", lambda self, ids, past=0, **kw: placed(self, ids, past + bool(past), **kw)
        )
    elif family == "songbloom":
        rotary = songbloom.rotary
        monkeypatch.setattr(songbloom, "rotary", lambda start, *rest: rotary(start + bool(start), *rest))
    else:
        room, name = {"heartmula": (heartmula, "rotations"), "fish_speech": (fish_speech, "rotation")}[family]
        rotate = getattr(room, name)
        monkeypatch.setattr(room, name, lambda at, *rest: rotate(at + int(at.shape[1] == 1), *rest))
