"""SongBloom's codec: windows, files, sketches, errors; and that diffusers' VAE is the published one."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from trainer.codecs import open_codec, songbloom
from trainer.codecs.songbloom import CODEBOOK, VAE_CONFIG, SongBloomCodec
from trainer.families.songbloom.spec import SongBloom
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.model import Codec

STRIDES, MULTIPLES = (2, 4, 4, 6, 10), (1, 1, 1, 1, 1)


def codec_of(pretrained: str = "random:full", **weights: str) -> SongBloomCodec:
    codec = open_codec(SongBloom(family="songbloom", pretrained=pretrained, codec=Codec(weights=weights)))
    assert isinstance(codec, SongBloomCodec)
    return codec


@pytest.fixture(scope="module")
def codec() -> SongBloomCodec:
    return codec_of("random:tiny")


@pytest.fixture(scope="module")
def audio() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, (2, 52 * 1920 + 17)).astype(np.float32)


def test_arrays_are_whole_blocks_and_of_the_shapes_it_tells(codec: SongBloomCodec, audio: np.ndarray) -> None:
    arrays = codec.encode(audio)
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        "latents": ((4, 48), "float16"),
        "sketch": ((48,), "uint16"),
        "style": ((4, 52), "float16"),
    }
    assert all(arrays[name].shape[-1] == 48 for name in codec.timed)
    assert arrays["sketch"].max() < codec.vocabulary == 256
    assert len(np.unique(arrays["sketch"])) > 10
    assert codec.decode(arrays).shape == (2, 48 * 1920)
    assert codec.decode({"latents": np.zeros((4, 0))}).shape == (2, 0)
    assert all(np.array_equal(array, codec.encode(audio)[name]) for name, array in arrays.items())


def test_the_style_is_the_first_seconds_in_mono(codec: SongBloomCodec, audio: np.ndarray) -> None:
    short = SongBloomCodec(None, style_seconds=1.0)
    assert short.style(audio).shape == (4, 25)
    assert np.allclose(short.style(audio), short.style(audio[::-1]), atol=1e-4)


def test_windows_sound_like_the_whole(
    codec: SongBloomCodec, audio: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, latents = codec.encode(audio)["latents"], np.random.default_rng(1).normal(size=(4, 52))
    sound = codec.decode({"latents": latents})
    monkeypatch.setattr(songbloom, "WINDOW", 25)
    assert np.abs(codec.encode(audio)["latents"] - whole).max() < 1e-2
    assert np.abs(codec.decode({"latents": latents}) - sound).max() < 1e-4 * np.abs(sound).max()


def test_a_release_is_read_under_the_names_of_stable_audio_tools(tmp_path: Path, audio: np.ndarray) -> None:
    folder = tmp_path / "重み"
    config = _write_release(folder)
    vae = songbloom._make_vae(config)
    read = codec_of(vae=f"file://{folder}", vq=f"file://{folder}/vq.safetensors")
    state = read.vae.state_dict()
    assert state.keys() == vae.state_dict().keys()
    assert torch.equal(state["encoder.block.4.res_unit3.snake2.beta"], torch.full((1, 8, 1), 0.25))
    assert read.vocabulary == 32
    assert read.style(audio).shape == (4, 52)
    with pytest.raises(UtaforgeError, match=r"model\.codec\.weights\.muq is not given"):
        read.encode(audio)
    whole = read.fingerprint
    save_file({CODEBOOK: torch.ones(1, 32, 1024)}, folder / "vq.safetensors")
    assert codec_of(vae=f"file://{folder}", vq=f"file://{folder}/vq.safetensors").fingerprint != whole


def test_the_vae_is_the_published_one_computed_from_the_tensors_of_its_file(tmp_path: Path) -> None:
    _write_release(tmp_path / "重み", multiples=(1, 2, 2, 3, 4))
    file = tmp_path / "重み" / "autoencoder_music_dsp1920.ckpt"
    dice = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=dice) * (0.1 if name.endswith("bias") else 0.5)
        for name, value in torch.load(file, weights_only=True)["state_dict"].items()
    }
    torch.save({"state_dict": state}, file)
    codec = codec_of(vae=f"file://{tmp_path}/重み")
    published = Oobleck(state)
    audio = torch.randn(2, 12 * 1920, generator=dice)
    latents = torch.randn(4, 12, generator=dice)
    assert _relative(codec.vae.encoder(audio[None])[0], published.encoded(audio)) < 1e-5
    assert _relative(torch.from_numpy(codec.decode({"latents": latents.numpy()})), published.decoded(latents)) < 1e-5


def test_making_the_vae_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        songbloom._make_vae(songbloom.TINY_VAE)


def test_missing_and_wrong_parts_are_named(codec: SongBloomCodec, tmp_path: Path) -> None:
    with pytest.raises(UtaforgeError, match=r"model\.codec\.weights\.vae is not given"):
        codec_of().decode({"latents": np.zeros((64, 1))})
    with pytest.raises(UtaforgeError, match=r"model\.codec\.weights\.vq: there is no /無い"):
        _ = codec_of(vq="file:///無い").vocabulary
    save_file({"weight": torch.ones(3)}, tmp_path / "vq.safetensors")
    with pytest.raises(UtaforgeError, match=f"has no {re.escape(CODEBOOK)}"):
        _ = codec_of(vq=f"file://{tmp_path}/vq.safetensors").vocabulary
    (tmp_path / "empty").mkdir()
    with pytest.raises(UtaforgeError, match=r"holds 0 \.ckpt"):
        _ = codec_of(vae=f"file://{tmp_path}/empty").vae
    _write_release(tmp_path / "速い", strides=(2, 2, 2, 2, 2))
    with pytest.raises(UtaforgeError, match=r"not 1920 at 48000 in stereo"):
        _ = codec_of(vae=f"file://{tmp_path}/速い").vae
    with pytest.raises(DataError, match="are not this VAE's, which has 4 channels"):
        codec.decode({"latents": np.zeros((64, 3))})
    with pytest.raises(DataError, match=r"is too short: 0\.04 s"):
        codec.encode(np.zeros((2, 1920), np.float32))


def test_without_its_package_muq_is_refused_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(UtaforgeError, match="package muq cannot be imported") as caught:
        _ = codec_of(muq=f"file://{tmp_path}").features
    assert "pip install muq" in caught.value.cure


class Oobleck:
    """The VAE in float64, of a state dict under stable-audio-tools' names.

    Evans et al. 2024, https://arxiv.org/abs/2407.14358: DAC's residual units, strided and transposed convolutions
    (Kumar et al. 2023, https://arxiv.org/abs/2306.06546), with weight normalisation; snake with a frequency and a
    height of its own for each channel, both logarithms (Lee et al. 2022, https://arxiv.org/abs/2206.04658); no tanh.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = {name: value.double() for name, value in state.items()}

    def encoded(self, audio: Tensor) -> Tensor:
        """[2, N] → means and scales [2·C, T]."""
        x = self._convolved(audio.double()[None], "encoder.layers.0", padding=3)
        for place, stride in enumerate(STRIDES, 1):
            block = f"encoder.layers.{place}.layers"
            for unit, dilation in enumerate((1, 3, 9)):
                x = self._unit(x, f"{block}.{unit}", dilation)
            x = self._convolved(self._snake(x, f"{block}.3"), f"{block}.4", stride=stride, padding=stride // 2)
        return self._convolved(self._snake(x, "encoder.layers.6"), "encoder.layers.7", padding=1)[0]

    def decoded(self, latents: Tensor) -> Tensor:
        """[C, T] → [2, N]."""
        x = self._convolved(latents.double()[None], "decoder.layers.0", padding=3)
        for place, stride in enumerate(reversed(STRIDES), 1):
            block = f"decoder.layers.{place}.layers"
            x = self._spread(self._snake(x, f"{block}.0"), f"{block}.1", stride)
            for unit, dilation in enumerate((1, 3, 9), 2):
                x = self._unit(x, f"{block}.{unit}", dilation)
        return self._convolved(self._snake(x, "decoder.layers.6"), "decoder.layers.7", padding=3)[0]

    def _unit(self, x: Tensor, name: str, dilation: int) -> Tensor:
        inner = self._convolved(
            self._snake(x, f"{name}.layers.0"), f"{name}.layers.1", padding=3 * dilation, dilation=dilation
        )
        return x + self._convolved(self._snake(inner, f"{name}.layers.2"), f"{name}.layers.3")

    def _snake(self, x: Tensor, name: str) -> Tensor:
        frequency, height = (self._state[f"{name}.{part}"].exp()[:, None] for part in ("alpha", "beta"))
        return x + (frequency * x).sin().square() / height

    def _convolved(self, x: Tensor, name: str, **how: int) -> Tensor:
        return functional.conv1d(x, self._weight(name), self._state.get(f"{name}.bias"), **how)

    def _spread(self, x: Tensor, name: str, stride: int) -> Tensor:
        """The transposed convolution of kernel 2·stride: zeros between the frames, then a convolution, backwards."""
        kernel = self._weight(name).transpose(0, 1).flip(-1)
        sparse = torch.zeros(*x.shape[:-1], (x.shape[-1] - 1) * stride + 1, dtype=x.dtype)
        sparse[..., ::stride] = x
        padding = 2 * stride - 1 - stride // 2
        return functional.conv1d(sparse, kernel, self._state[f"{name}.bias"], padding=padding)

    def _weight(self, name: str) -> Tensor:
        direction = self._state[f"{name}.weight_v"]
        return self._state[f"{name}.weight_g"] * direction / direction.square().sum((1, 2), keepdim=True).sqrt()


def _relative(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm())


def _write_release(
    folder: Path, strides: tuple[int, ...] = STRIDES, multiples: tuple[int, ...] = MULTIPLES
) -> dict[str, object]:
    """A VAE under stable-audio-tools' names, its own JSON and a codebook; returns diffusers' configuration."""
    folder.mkdir()
    sizes = {"channels": 8, "c_mults": multiples, "strides": strides, "use_snake": True}
    told = {
        "sample_rate": 48_000,
        "model": {
            "encoder": {"type": "oobleck", "config": {**sizes, "in_channels": 2, "latent_dim": 8}},
            "decoder": {
                "type": "oobleck",
                "config": {**sizes, "out_channels": 2, "latent_dim": 4, "final_tanh": False},
            },
        },
    }
    (folder / VAE_CONFIG).write_text(json.dumps(told))
    config = {**songbloom.TINY_VAE, "downsampling_ratios": list(strides), "channel_multiples": list(multiples)}
    state = {_numbered(name): _value(name, value) for name, value in songbloom._make_vae(config).state_dict().items()}
    torch.save({"state_dict": state}, folder / "autoencoder_music_dsp1920.ckpt")
    save_file({CODEBOOK: torch.randn(1, 32, 1024)}, folder / "vq.safetensors")
    return config


def _value(name: str, value: torch.Tensor) -> torch.Tensor:
    snake = name.endswith((".alpha", ".beta"))
    return torch.full((value.shape[1],), 0.25) if snake else value


def _numbered(name: str) -> str:
    """stable-audio-tools' name: places in sequences of layers."""
    side, *rest = name.split(".")
    if rest[0] != "block":
        return f"{side}.layers.{dict(conv1=0, snake1=6, conv2=7)[rest[0]]}.{rest[1]}"
    units = ["res_unit1", "res_unit2", "res_unit3"]
    places = [*units, "snake1", "conv1"] if side == "encoder" else ["snake1", "conv_t1", *units]
    place = places.index(rest[2])
    inner = ["snake1", "conv1", "snake2", "conv2"]
    unit = f"layers.{inner.index(rest[3])}." if len(rest) == 5 else ""
    return f"{side}.layers.{int(rest[1]) + 1}.layers.{place}.{unit}{rest[-1]}"
