"""EnCodec around transformers' network: windows, files, errors. Its numbers are in tests/golden."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainer.codecs import encodec
from trainer.codecs.encodec import Encodec
from trainer.families.musicgen.spec import MusicGen
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.model import Codec


def model(pretrained: str, **weights: str) -> MusicGen:
    return MusicGen(family="musicgen", pretrained=pretrained, codec=Codec(name="encodec", weights=weights))


@pytest.fixture(scope="module")
def codec() -> Encodec:
    return Encodec.open(model("random:tiny"))


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (1, 4 * 32_000 + 17)).astype(np.float32)


def test_shapes_are_those_it_tells(codec: Encodec, audio: np.ndarray) -> None:
    codes = codec.encode(audio)["codes"]
    assert codes.shape == (codec.codebooks, 201)
    assert codes.max() < codec.vocabulary
    assert codec.decode({"codes": codes}).shape == (1, 201 * 640)
    assert codec.decode(codec.encode(audio[:, :0])).shape == (1, 0)


def test_windows_sound_like_the_whole(codec: Encodec, audio: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = codec.encode(audio)
    sound = codec.decode(whole)
    monkeypatch.setattr(encodec, "WINDOW_SECONDS", 1.5)
    assert (codec.encode(audio)["codes"] == whole["codes"]).mean() > 0.99
    assert np.abs(codec.decode(whole) - sound).max() < 1e-2 * np.abs(sound).max()


@pytest.mark.parametrize("inside", [True, False])
def test_a_release_is_read_with_the_old_names_of_weight_norm(tmp_path: Path, codec: Encodec, inside: bool) -> None:
    folder = tmp_path / "重み"
    folder.mkdir()
    config = codec._config.to_dict()
    (folder / "config.json").write_text(json.dumps({"audio_encoder": config} if inside else config))
    names = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}

    def old(name: str) -> str:
        for new, before in names.items():
            name = name.replace(new, before)
        return f"audio_encoder.{name}" if inside else name

    state = {old(name): value.clone() for name, value in codec.model.state_dict().items()}
    if inside:
        state["decoder.lm_heads.0.weight"] = torch.zeros(1)
    save_file(state, folder / "model.safetensors")
    read = Encodec.open(model(f"file://{folder}") if inside else model("random:tiny", encodec=f"file://{folder}"))
    assert read.fingerprint == codec.fingerprint


def test_missing_weights_and_foreign_codes_are_refused(codec: Encodec) -> None:
    with pytest.raises(UtaforgeError, match=r"model\.codec\.weights\.encodec is not given"):
        Encodec.open(model("builtin:pocket"))
    with pytest.raises(UtaforgeError, match=r"model\.codec\.weights\.encodec: there is no /無い"):
        Encodec.open(model("builtin:pocket", encodec="file:///無い"))
    with pytest.raises(DataError, match="are not this EnCodec's"):
        codec.decode({"codes": np.full((4, 3), 256)})
