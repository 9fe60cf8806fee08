"""HeartCodec's decoder: windows, files, errors. Its numbers are in ../shared/golden."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from trainer.codecs import open_codec
from trainer.codecs.heartcodec import HeartCodec, joined, window_latents
from trainer.codecs.heartcodec_network import HeartCodecConfig, HeartCodecNetwork
from trainer.families.heartmula.spec import HeartMuLa
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.model import Codec

ENCODER_PARAMETERS = 84_307_384
"""Of the release's waveform encoder, which decoding does without."""


def model(pretrained: str = "random:tiny", **weights: str) -> HeartMuLa:
    return HeartMuLa(family="heartmula", pretrained=pretrained, codec=Codec(weights=weights))


@pytest.fixture(scope="module")
def codec() -> HeartCodec:
    codec = open_codec(model())
    assert isinstance(codec, HeartCodec)
    return codec


@pytest.fixture(scope="module")
def codes(codec: HeartCodec) -> np.ndarray:
    return np.random.default_rng(0).integers(0, codec.vocabulary, (codec.codebooks, 25)).astype(np.uint16)


def test_the_released_size_has_the_facts_parameters() -> None:
    with torch.device("meta"):
        network = HeartCodecNetwork(HeartCodecConfig())
    assert sum(p.numel() for p in network.parameters()) + ENCODER_PARAMETERS == 1_655_308_877


def test_codes_become_stereo_of_their_length_the_same_each_time(codec: HeartCodec, codes: np.ndarray) -> None:
    sound = codec.decode({"codes": codes})
    assert sound.shape == (2, 25 * 16_000 * 2 // 25)
    assert sound.dtype == np.float32
    assert np.isfinite(sound).all()
    assert np.array_equal(sound, codec.decode({"codes": codes}))
    assert codec.decode({"codes": codes[:, :0]}).shape == (2, 0)


def test_different_codes_sound_different_and_the_two_channels_too(codec: HeartCodec, codes: np.ndarray) -> None:
    first, other = (codec.decode({"codes": (codes + shift) % codec.vocabulary}) for shift in (0, 1))
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(first[0] - first[1]).max() > 1e-3


def test_windows_continue_one_another_up_to_the_last_code(codec: HeartCodec, codes: np.ndarray) -> None:
    seconds, size, hop = 7.44, 93, 80
    network = codec.network
    draw = torch.Generator().manual_seed(0)

    def decode(frames: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        song = torch.from_numpy(np.resize(codes, (8, frames)).astype(np.int64))
        noise = draw.manual_seed(0)
        windows = list(window_latents(network, song, lambda s: torch.randn(s, generator=noise), seconds, 2))
        return windows, joined(network, iter(windows), frames, seconds)

    with torch.inference_mode():
        for frames, count in ((1, 1), (93, 1), (94, 2), (106, 2), (173, 2), (174, 3)):
            windows, sound = decode(frames)
            assert len(windows) == count
            assert sound.shape == (2, int(frames / 12.5 * 16_000))
            for before, after in pairwise(windows):
                assert torch.equal(after[: 2 * (size - hop)], before[2 * hop :])


def test_there_is_no_encoder_and_the_error_says_where_codes_come_from(tmp_path: Path, codec: HeartCodec) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "heartcodec"}))
    real = HeartCodec.open(model(heartcodec=f"file://{tmp_path}"))
    assert (real.sample_rate, real.codebooks, real.vocabulary) == (48_000, 8, 8192)
    with pytest.raises(DataError, match="no public encoder") as error:
        real.encode(np.zeros((2, 48_000), np.float32))
    assert ".tokens.npy" in error.value.cure


def test_a_rehearsals_stand_in_has_the_shape_of_codes(codec: HeartCodec) -> None:
    loud = np.random.default_rng(0).normal(0, 0.3, (2, 16_000)).astype(np.float32)
    codes = codec.encode(np.concatenate([loud, np.zeros_like(loud)], 1))["codes"]
    assert codes.shape == (8, 25)
    assert codes.max() < codec.vocabulary
    assert codes[:, :12].min() > 0
    assert not codes[:, 13:].any()
    assert codec.encode(loud[:, :0])["codes"].shape == (8, 0)


def test_a_release_is_read_without_its_encoder(tmp_path: Path, codec: HeartCodec, codes: np.ndarray) -> None:
    folder = tmp_path / "符号器"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "heartcodec", **asdict(codec._config)}))
    state = {name: value.clone() for name, value in codec.network.state_dict().items()}
    save_file({**state, "scalar_model.encoder.0.bias": torch.zeros(2)}, folder / "model.safetensors")
    read = open_codec(model("file:///歌", heartcodec=f"file://{folder}"))
    assert read.fingerprint == codec.fingerprint
    assert np.array_equal(read.decode({"codes": codes}), codec.decode({"codes": codes}))
    state.pop("flow_matching.cond_feature_emb.bias")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UtaforgeError, match=r"missing: flow_matching\.cond_feature_emb\.bias"):
        open_codec(model("file:///歌", heartcodec=f"file://{folder}")).decode({"codes": codes})


def test_missing_weights_foreign_releases_and_foreign_codes_are_refused(tmp_path: Path, codec: HeartCodec) -> None:
    with pytest.raises(UtaforgeError, match=r"model\.codec\.weights\.heartcodec is not given") as error:
        open_codec(model("file:///歌"))
    assert "HeartCodec-oss" in error.value.cure
    with pytest.raises(UtaforgeError, match=r"model\.codec\.weights\.heartcodec: there is no /無い"):
        open_codec(model(heartcodec="file:///無い"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "encodec"}))
    with pytest.raises(UtaforgeError, match="describes 'encodec', not a causal 'heartcodec'"):
        open_codec(model(heartcodec=f"file://{tmp_path}"))
    for wrong in (np.full((8, 3), 1024), np.full((8, 3), -1), np.zeros((4, 3), np.int64)):
        with pytest.raises(DataError, match="are not this HeartCodec's"):
            codec.decode({"codes": wrong})
