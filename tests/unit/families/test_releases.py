"""Weights are read from the folder of a release and from its file alike, and tell what they are."""

from pathlib import Path

import pytest
import torch

from tests.unit.families.conftest import ace_step_release, fish_speech_release
from tests.unit.families.test_every_family import MODELS, model
from trainer.families import open_family, recognise
from trainer.families.ace_step.weights import PART
from trainer.spec.errors import UtaforgeError
from trainer.spec.families import dims_of
from trainer.weights import read_json

FILES = {
    "musicgen": "model.safetensors",
    "songbloom": "songbloom.pt",
    "heartmula": "model.safetensors",
    "ace_step": "diffusion_pytorch_model.safetensors",
    "fish_speech": "model.pth",
    "fish_speech 1.4": "model.pth",
}


@pytest.fixture(scope="module", params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def release(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("公開") / "歌"
    family = open_family(model(name))
    family.save(family.network(), folder, {})
    if name.startswith("fish_speech"):
        fish_speech_release(folder, MODELS[name]["version"])
    return folder


def test_folder_and_file_hold_the_same_network(name: str, release: Path) -> None:
    wanted = open_family(model(name)).network().state_dict()
    for place in (release, release / FILES[name]):
        asked = model(name, f"file://{place}")
        found = open_family(asked).network().state_dict()
        assert name != "musicgen" or dims_of(asked).width == 64, "its size is planned with as it is"
        assert found.keys() == wanted.keys()
        assert all(torch.equal(value, wanted[key]) for key, value in found.items())


def test_folder_and_file_tell_family_and_version(name: str, release: Path) -> None:
    version = {"version": MODELS[name]["version"]} if name.startswith("fish_speech") else {}
    for place in (release, release / FILES[name]):
        assert recognise(f"file://{place}") == {"family": name.split()[0], **version}


def test_the_folder_above_an_ace_step_is_one_and_an_empty_folder_is_none(tmp_path: Path) -> None:
    top = ace_step_release(tmp_path / "公開")
    assert recognise(f"file://{top}") == recognise(f"file://{top}/{PART}") == {"family": "ace_step"}
    assert recognise(f"file://{tmp_path}") is None


def test_a_configuration_below_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "重み").write_bytes(b"")
    with pytest.raises(UtaforgeError, match=r"重み/config\.json cannot be read: Not a directory"):
        read_json(tmp_path / "重み" / "config.json")
