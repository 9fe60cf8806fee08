"""SongBloom's codec: 48 kHz stereo ⇄ 25 latents a second, and the sketch that the planner writes.

Latents are an Oobleck VAE's (Evans et al. 2024, https://arxiv.org/abs/2407.14358), ``diffusers``' network under the
release's names. A sketch id is the entry of a codebook nearest to MuQ's features (Zhu et al. 2025,
https://arxiv.org/abs/2501.01108). The codebook that the released network was trained with is not public: ``SOURCE.md``
in ``trainer/families/songbloom`` says what to do.

Long songs are coded in windows that see all the surroundings that the VAE looks at.
"""

import hashlib
import re
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torchaudio.functional import resample

from trainer.families.songbloom.spec import SongBloom
from trainer.shapes import Float, Int
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.model import BaseModelSpec
from trainer.weights import load, local_path, random_weights, read_json, tensors

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck

SAMPLE_RATE, HOP = 48_000, 1920
BLOCK = 16
"""Frames that SongBloom renders together: songs are cut to whole blocks."""
MUQ_RATE = 24_000
WINDOW, CONTEXT = 750, 16
"""Frames coded at a time, and seen on either side: more than the VAE's receptive field, about 9."""
VAE_CONFIG = "stable_audio_1920_vae.json"
CODEBOOK = "_codebook.embed"
"""Of vector_quantize_pytorch's ``VectorQuantize``."""
NOISE_SEED = 0
TINY_VAE = {
    "encoder_hidden_size": 8,
    "downsampling_ratios": [2, 4, 4, 6, 10],
    "channel_multiples": [1, 1, 1, 1, 1],
    "decoder_channels": 8,
    "decoder_input_channels": 4,
    "audio_channels": 2,
    "sampling_rate": SAMPLE_RATE,
}
TINY_FEATURES, TINY_PITCHES = 16, 256
WHERE = {
    "vae": f"a folder with CypressYang/SongBloom's autoencoder_music_dsp1920.ckpt and {VAE_CONFIG}",
    "vq": f"a codebook of MuQ features (safetensors or .pt with {CODEBOOK}); none is published, see SOURCE.md",
    "muq": "the folder of OpenMuQ/MuQ-large-msd-iter",
}


class SongBloomCodec:
    """Stereo ⇄ ``latents``; encoding also gives ``sketch`` and ``style``.

    Args:
        weights: URLs of ``vae``, ``vq`` and ``muq``, each read when it is first needed; None for tiny random ones.
        style_seconds: how much of a song's beginning is its style.
    """

    name = "songbloom"
    sample_rate = SAMPLE_RATE
    channels = 2
    frame_rate = SAMPLE_RATE / HOP
    codebooks = 1
    timed = ("latents", "sketch")

    def __init__(self, weights: Mapping[str, str] | None, style_seconds: float) -> None:
        self._weights, self._style_seconds = weights, style_seconds

    @classmethod
    def open(cls, model: BaseModelSpec) -> "SongBloomCodec":
        """The codec of ``model.codec.weights``."""
        assert isinstance(model, SongBloom)
        tiny = model.pretrained == "random:tiny" and not model.codec.weights
        return cls(None if tiny else model.codec.weights, model.style_seconds)

    @cached_property
    def vocabulary(self) -> int:
        """Entries of the sketch codebook."""
        return len(self.codebook)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the codebook and of the VAE's weights, as they are in the files."""
        digest = hashlib.sha256(self.codebook.numpy().tobytes())
        for name, value in sorted(tensors(self._vae_release[0])) if self._weights is not None else ():
            digest.update(name.encode())
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def vae(self) -> "AutoencoderOobleck":
        """Part ``vae``, on the CPU in fp32."""
        if self._weights is None:
            return random_weights(lambda: _make_vae(TINY_VAE)).eval().requires_grad_(False)
        file, config = self._vae_release
        state = ((_renamed(name, len(config["downsampling_ratios"])), value) for name, value in tensors(file))
        shaped = ((name, _shaped(name, value)) for name, value in state)
        return load(lambda: _make_vae(config), shaped, self._weights["vae"]).eval().requires_grad_(False)

    @cached_property
    def codebook(self) -> Float[Tensor, "V F"]:
        """Part ``vq``."""
        if self._weights is None:
            return torch.randn(TINY_PITCHES, TINY_FEATURES, generator=torch.Generator().manual_seed(NOISE_SEED))
        found = [value for _, value in tensors(self._part("vq"), lambda name: name.endswith(CODEBOOK))]
        if len(found) != 1 or found[0].squeeze(0).ndim != 2:
            raise UtaforgeError(f"model.codec.weights.vq: {self._weights['vq']} has no {CODEBOOK}", WHERE["vq"])
        return found[0].squeeze(0).float()

    @cached_property
    def features(self) -> "nn.Module":
        """Part ``muq``: mono at 24 kHz → features, on the CPU in fp32."""
        return TinyFeatures() if self._weights is None else Muq(self._part("muq"))

    def encode(self, audio: Float[np.ndarray, "2 N"]) -> dict[str, np.ndarray]:
        """``latents`` [C, T] float16, ``sketch`` [T] uint16, and ``style`` [C, ≤ 250] float16, of whole blocks.

        Raises:
            DataError: ``audio`` is shorter than a block.
        """
        latents = self._latents(audio)
        sketch = self._sketch(audio)
        frames = min(latents.shape[1], len(sketch)) // BLOCK * BLOCK
        if not frames:
            raise DataError(
                f"is too short: {audio.shape[1] / SAMPLE_RATE:.2f} s, a block is {BLOCK * HOP / SAMPLE_RATE} s"
            )
        return {
            "latents": latents[:, :frames].astype(np.float16),
            "sketch": sketch[:frames].astype(np.uint16),
            "style": self.style(audio).astype(np.float16),
        }

    def style(self, audio: Float[np.ndarray, "2 N"]) -> Float[np.ndarray, "C frames"]:
        """Latents of the beginning of ``audio``, both channels the mean of the two, as upstream makes prompts."""
        beginning = audio[:, : round(self._style_seconds * SAMPLE_RATE)]
        return self._latents(np.broadcast_to(beginning.mean(axis=0), beginning.shape))

    def decode(self, arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "2 N"]:
        """Audio of ``latents`` [C, T]: ``N = 1920 · T``.

        Raises:
            DataError: they have another number of channels.
        """
        latents = torch.from_numpy(arrays["latents"].astype(np.float32))
        wanted = self.vae.config["decoder_input_channels"]
        if len(latents) != wanted:
            raise DataError(
                f"latents of shape {list(latents.shape)} are not this VAE's, which has {wanted} channels",
                "decode them with the VAE that made them",
            )
        parts = [
            self._decode(latents[:, first:last])[:, (begin - first) * HOP :][:, : count * HOP]
            for begin, count, first, last in _windows(latents.shape[1])
        ]
        return torch.cat(parts, 1).numpy() if parts else np.zeros((2, 0), np.float32)

    def _latents(self, audio: Float[np.ndarray, "2 N"]) -> Float[np.ndarray, "C T"]:
        """A draw of the VAE's, always the same; upstream trains on draws as well, not on means."""
        frames = audio.shape[1] // HOP
        samples = torch.from_numpy(np.ascontiguousarray(audio[:, : frames * HOP]))
        parts = [
            self._encode(samples[:, first * HOP : last * HOP])[:, begin - first :][:, :count]
            for begin, count, first, last in _windows(frames)
        ]
        if not parts:
            return np.zeros((self.vae.config["decoder_input_channels"], 0), np.float32)
        mean, scale = torch.cat(parts, 1).chunk(2)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
        return (mean + (nn.functional.softplus(scale) + 1e-4) * noise).numpy()

    @cached_property
    def _vae_release(self) -> tuple[Path, dict[str, Any]]:
        folder = self._part("vae")
        return _vae_files(folder, str(folder))

    @torch.inference_mode()
    def _sketch(self, audio: Float[np.ndarray, "2 N"]) -> Int[np.ndarray, " T"]:
        mono = resample(torch.from_numpy(audio).mean(0, keepdim=True), SAMPLE_RATE, MUQ_RATE)
        features = self.features(mono)[0]
        return torch.cdist(features, self.codebook).argmin(1).numpy()

    @torch.inference_mode()
    def _encode(self, samples: Float[Tensor, "2 N"]) -> Float[Tensor, "2*C T"]:
        return self.vae.encoder(samples[None])[0]

    @torch.inference_mode()
    def _decode(self, latents: Float[Tensor, "C T"]) -> Float[Tensor, "2 N"]:
        return self.vae.decoder(latents[None])[0]

    def _part(self, part: str) -> Path:
        assert self._weights is not None
        if part not in self._weights:
            raise UtaforgeError(f"model.codec.weights.{part} is not given", f"name there {WHERE[part]}")
        return local_path(self._weights[part], f"model.codec.weights.{part}")


class Muq(nn.Module):
    """MuQ through its authors' package, which is not among ours (https://pypi.org/project/muq)."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        try:
            from muq import MuQ  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise UtaforgeError(
                f"sketches are made with MuQ, and the package muq cannot be imported: {error}",
                "install it where songs are prepared (pip install muq), or bring shards that have a sketch already",
            ) from error
        self.muq: Any = MuQ.from_pretrained(str(folder)).eval()

    def forward(self, samples: Float[Tensor, "1 N"]) -> Float[Tensor, "1 T F"]:
        """The last hidden states, 25 a second."""
        return self.muq(samples, output_hidden_states=False).last_hidden_state


class TinyFeatures(nn.Module):
    """What ``random:tiny`` has in MuQ's place: random projections of 40 ms, each of variance 1."""

    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(NOISE_SEED)
        self.register_buffer("matrix", torch.randn(HOP // 2, TINY_FEATURES, generator=generator))

    def forward(self, samples: Float[Tensor, "1 N"]) -> Float[Tensor, "1 T F"]:
        """25 a second."""
        frames = samples[:, : samples.shape[1] // len(self.matrix) * len(self.matrix)].unflatten(
            1, (-1, len(self.matrix))
        )
        projected = frames @ self.matrix
        return projected / projected.std(-1, keepdim=True).clamp(min=1e-6)


def _windows(frames: int) -> list[tuple[int, int, int, int]]:
    """(first frame wanted, how many, first frame seen, end of what is seen) of each window."""
    return [
        (begin, min(WINDOW, frames - begin), max(begin - CONTEXT, 0), min(begin + WINDOW + CONTEXT, frames))
        for begin in range(0, frames, WINDOW)
    ]


def _make_vae(config: dict[str, Any]) -> "AutoencoderOobleck":
    from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*weight_norm.* is deprecated", FutureWarning)
        return AutoencoderOobleck(**config)


def _vae_files(folder: Path, url: str) -> tuple[Path, dict[str, Any]]:
    """The VAE's weights and its configuration as ``AutoencoderOobleck`` takes it.

    The release's JSON is stable-audio-tools': ``model.encoder.config`` and ``model.decoder.config``.
    """
    files = sorted(folder.glob("*.ckpt"))
    if len(files) != 1:
        raise UtaforgeError(f"model.codec.weights.vae: {url} holds {len(files)} .ckpt", f"name {WHERE['vae']}")
    told = read_json(folder / VAE_CONFIG)
    try:
        encoder, decoder = (told["model"][side]["config"] for side in ("encoder", "decoder"))
        strides, rate = encoder["strides"], told["sample_rate"]
        same = encoder["c_mults"] == decoder["c_mults"] and strides == decoder["strides"]
        snake = encoder["use_snake"] and decoder["use_snake"] and not decoder.get("final_tanh", True)
        if not (same and snake and encoder["latent_dim"] == encoder["channels"] == 2 * decoder["latent_dim"]):
            raise ValueError("encoder and decoder do not fit one another, or have another architecture")
        if int(np.prod(strides)) != HOP or rate != SAMPLE_RATE or encoder["in_channels"] != 2:
            raise ValueError(f"it has {strides} samples a frame at {rate} Hz, not {HOP} at {SAMPLE_RATE} in stereo")
    except (KeyError, TypeError, ValueError) as error:
        raise UtaforgeError(
            f"{folder / VAE_CONFIG} is not of SongBloom's VAE ({type(error).__name__}: {error})",
            f"name {WHERE['vae']}",
        ) from error
    return files[0], {
        "encoder_hidden_size": encoder["channels"],
        "downsampling_ratios": strides,
        "channel_multiples": encoder["c_mults"],
        "decoder_channels": decoder["channels"],
        "decoder_input_channels": decoder["latent_dim"],
        "audio_channels": encoder["in_channels"],
        "sampling_rate": rate,
    }


_UNIT = ("snake1", "conv1", "snake2", "conv2")
_BLOCKS = {
    "encoder": ("res_unit1", "res_unit2", "res_unit3", "snake1", "conv1"),
    "decoder": ("snake1", "conv_t1", "res_unit1", "res_unit2", "res_unit3"),
}


def _renamed(name: str, blocks: int) -> str:
    """``diffusers``' name of a tensor that stable-audio-tools numbers by its place in nested sequences.

    A side is a convolution, the blocks, an activation and a convolution; a block's places are ``_BLOCKS``, a residual
    unit's ``_UNIT``.
    """
    match = re.fullmatch(r"(?:autoencoder\.)?(encoder|decoder)\.layers\.(\d+)\.(.*)", name)
    if not match:
        return name
    side, place, rest = match[1], int(match[2]), match[3]
    if not 1 <= place <= blocks:
        return f"{side}.{'conv1' if place == 0 else ('snake1', 'conv2')[place - blocks - 1]}.{rest}"
    inside = re.fullmatch(r"layers\.(\d)\.(?:layers\.(\d)\.)?(\w+)", rest)
    if not inside:
        return name
    unit = f"{_UNIT[int(inside[2])]}." if inside[2] else ""
    return f"{side}.block.{place - 1}.{_BLOCKS[side][int(inside[1])]}.{unit}{inside[3]}"


def _shaped(name: str, value: Tensor) -> Tensor:
    """Activations have their channels in the middle axis there."""
    return value.reshape(1, -1, 1) if name.endswith((".alpha", ".beta")) and value.ndim == 1 else value
