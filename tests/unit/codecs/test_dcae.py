import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainer.codecs.adamos import LogMel, VocoderConfig
from trainer.codecs.dcae import TINY_DCAE, TINY_VOCODER, WEIGHTS, Dcae
from trainer.families.ace_step.spec import AceStep
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.model import Codec


@pytest.fixture(scope="module")
def codec() -> Dcae:
    return Dcae.open(AceStep(family="ace_step", pretrained="random:tiny"))


@pytest.fixture(scope="module")
def song() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 20_000)).astype(np.float32) * 0.1


def test_latents_are_those_of_the_whole_frames(codec, song):
    found = codec.encode(song)
    assert found["latents"].shape == (8, 16, 4) and found["latents"].dtype == np.float16
    assert codec.encode(song[:, :100])["latents"].shape == (8, 16, 1)
    assert codec.frame_rate == pytest.approx(10.7666, abs=1e-4)


def test_decoding_gives_stereo_of_whole_frames(codec, song):
    audio = codec.decode(codec.encode(song))
    assert audio.shape == (2, 4 * 4096) and audio.dtype == np.float32
    assert np.abs(audio).max() <= 1


def test_latents_of_another_codec_are_refused(codec):
    with pytest.raises(DataError, match=r"\(4, 16, 3\) are not ACE-Step's"):
        codec.decode({"latents": np.zeros((4, 16, 3), np.float16)})


def test_silence_is_below_minus_nine_and_a_tone_stands_in_its_bin():
    front = LogMel(VocoderConfig())
    assert front(torch.zeros(1, 4096)).max() < -9
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(8192) / 44_100)[None]
    assert front(tone).shape == (1, 128, 16)
    loudest = {int(bin) for bin in front(tone)[0, :, 2:-2].argmax(0)}
    louder = {int(bin) for bin in front(torch.sin(torch.arange(8192) * 0.5)[None])[0, :, 2:-2].argmax(0)}
    assert max(loudest) - min(loudest) <= 1 and min(louder) > max(loudest)


def test_a_release_is_read_part_by_part(codec, song, tmp_path):
    parts = {
        "dcae": (codec.autoencoder, TINY_DCAE),
        "vocoder": (codec.vocoder, {name: getattr(TINY_VOCODER, name) for name in vars(TINY_VOCODER)}),
    }
    for part, (network, config) in parts.items():
        folder = tmp_path / "歌" / part
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(network.state_dict(), folder / WEIGHTS)
    urls = {part: f"file://{tmp_path}/歌/{part}" for part in parts}
    read = Dcae.open(AceStep(family="ace_step", pretrained="file:///x", codec=Codec(weights=urls)))
    assert read.fingerprint == codec.fingerprint
    latents = codec.encode(song)
    assert np.array_equal(read.encode(song)["latents"], latents["latents"])
    assert np.array_equal(read.decode(latents), codec.decode(latents))


def test_a_missing_part_is_named_where_it_is_needed(codec, song, tmp_path):
    bare = Dcae.open(AceStep(family="ace_step", pretrained="file:///x"))
    with pytest.raises(UtaforgeError, match=r"model.codec.weights.dcae is not given(.|\n)*music_dcae_f8c8"):
        bare.encode(song)
    (tmp_path / "config.json").write_text(json.dumps({"use_template": True}))
    wrong = Codec(weights={"vocoder": f"file://{tmp_path}"})
    with pytest.raises(UtaforgeError, match="is not ACE-Step's vocoder"):
        _ = Dcae.open(AceStep(family="ace_step", pretrained="file:///歌", codec=wrong)).vocoder
