"""FireflyGAN with tiny random weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.codecs import firefly
from trainer.codecs.firefly import TINY, Firefly, FireflyCodec, FireflyConfig
from trainer.families.fish_speech.spec import FishSpeech
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.model import Codec
from trainer.weights import random_weights


@pytest.fixture(scope="module")
def codec() -> FireflyCodec:
    return FireflyCodec.open(FishSpeech(family="fish_speech", pretrained="random:tiny"))


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (1, samples)).astype(np.float32)


def test_the_release_has_eight_books_of_a_thousand_codes_at_21_5_frames_a_second() -> None:
    codec = FireflyCodec(FireflyConfig(), "file:///公開/generator.pth")
    assert (codec.sample_rate, codec.channels, codec.codebooks, codec.vocabulary) == (44_100, 1, 8, 1000)
    assert codec.frame_rate == pytest.approx(21.533, abs=1e-3)


@pytest.mark.parametrize(("samples", "frames"), [(0, 0), (2047, 0), (2048, 1), (2048 * 7 + 100, 7)])
def test_whole_frames_are_coded_and_come_back_as_long(codec: FireflyCodec, samples: int, frames: int) -> None:
    codes = codec.encode(noise(samples))["codes"]
    assert codes.shape == (8, frames) and codes.dtype == np.uint16
    assert codec.decode({"codes": codes}).shape == (1, frames * 2048)


def test_codes_follow_from_what_was_heard_so_far(codec: FireflyCodec) -> None:
    audio = noise(2048 * 8)
    changed = np.concatenate([audio[:, : 2048 * 6], -0.5 * audio[:, 2048 * 6 :]], 1)
    first, second = codec.encode(audio)["codes"], codec.encode(changed)["codes"]
    assert np.array_equal(first[:, :5], second[:, :5]), "the spectrum looks ahead by less than a frame"
    assert not np.array_equal(first, second)


def test_long_songs_are_decoded_in_windows_without_a_seam(codec: FireflyCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {"codes": np.random.default_rng(1).integers(0, 1000, (8, 90)).astype(np.uint16)}
    whole = codec.decode(codes)
    monkeypatch.setattr(firefly, "WINDOW", 32)
    monkeypatch.setattr(firefly, "CONTEXT", 24)
    np.testing.assert_allclose(codec.decode(codes), whole, atol=1e-5)


def test_codes_of_another_codec_are_refused(codec: FireflyCodec) -> None:
    for codes in (np.full((8, 2), 1000), np.zeros((4, 2))):
        with pytest.raises(DataError, match="are not FireflyGAN's"):
            codec.decode({"codes": codes})


def test_weights_come_from_the_users_path_strictly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firefly, "FireflyConfig", lambda: TINY)
    file = tmp_path / "声.pth"
    weights = Codec(weights={"firefly": f"file://{file}"})
    model = FishSpeech(family="fish_speech", pretrained="random:tiny", codec=weights)
    with pytest.raises(UtaforgeError, match=r"model\.codec\.weights\.firefly: there is no"):
        _ = FireflyCodec.open(model).network
    state = random_weights(lambda: Firefly(TINY)).state_dict()
    torch.save(
        {f"generator.{name}": value for name, value in state.items()} | {"discriminators.0": torch.ones(1)}, file
    )
    found = FireflyCodec.open(model)
    assert found.fingerprint == FireflyCodec(TINY, None).fingerprint
    state["quantizer.residual_fsq.rvqs.0.project_in.bias"] += 1
    torch.save(state, file)
    assert FireflyCodec.open(model).fingerprint != found.fingerprint
    torch.save({**state, "歌": torch.ones(1)}, file)
    with pytest.raises(UtaforgeError, match="unexpected: 歌"):
        _ = FireflyCodec.open(model).network


def test_without_weights_the_cure_names_the_file() -> None:
    with pytest.raises(UtaforgeError, match=r"model\.codec\.weights\.firefly is not given") as caught:
        FireflyCodec.open(FishSpeech(family="fish_speech", pretrained="file:///公開"))
    assert "firefly-gan-vq-fsq-8x1024-21hz-generator.pth" in str(caught.value)
