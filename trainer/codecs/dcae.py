"""ACE-Step's codec: 44.1 kHz stereo ⇄ latents, by way of log-mel spectrograms.

``AutoencoderDC`` (Chen et al. 2024, https://arxiv.org/abs/2410.10733) as ``diffusers`` has it makes latents of both
channels' spectrograms, as if of an image; ``adamos.Vocoder`` makes sound of the spectrograms that come back. Constants:
ace-step/ACE-Step@d612523f50e252c0e138e68ae75b06223f96e934, ``music_dcae/music_dcae_pipeline.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainer.shapes import Float
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.model import BaseModelSpec
from trainer.weights import load, local_path, random_weights, read_json, tensors

from .adamos import LogMel, Vocoder, VocoderConfig
from .base import hash_of_weights

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

WEIGHTS = "diffusion_pytorch_model.safetensors"
SAMPLE_RATE = 44_100
HOP = 512 * 8
"""Samples of a latent frame: those of a spectrum, times the autoencoder's reduction."""
SHAPE = (8, 16)
"""Channels and bins of a latent frame."""
TINY_DCAE = {
    "in_channels": 2,
    "latent_channels": 8,
    "encoder_block_types": ["ResBlock"] * 4,
    "decoder_block_types": ["ResBlock"] * 4,
    "encoder_block_out_channels": [8, 8, 8, 8],
    "decoder_block_out_channels": [8, 8, 8, 8],
    "encoder_layers_per_block": [1, 1, 1, 1],
    "decoder_layers_per_block": [1, 1, 1, 1],
    "encoder_qkv_multiscales": [[], [], [], []],
    "decoder_qkv_multiscales": [[], [], [], []],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
}
TINY_VOCODER = VocoderConfig(
    depths=(1, 1, 1, 1),
    dims=(8, 8, 8, 8),
    num_mels=8,
    upsample_initial_channel=128,
    resblock_kernel_sizes=(3,),
    resblock_dilation_sizes=((1,),),
)


@dataclass(frozen=True)
class Scaling:
    """From log-mel values to the autoencoder's input, and from its code to latents.

    Attributes:
        least: log-mel value that becomes -1.
        most: log-mel value that becomes 1.
        shift: taken from the code.
        scale: by which the code is multiplied then.
    """

    least: float = -11.0
    most: float = 3.0
    shift: float = -1.9091
    scale: float = 0.1786

    def given(self, log_mel: Tensor) -> Tensor:
        """The autoencoder's input."""
        return (log_mel - self.least) / (self.most - self.least) * 2 - 1

    def heard(self, output: Tensor) -> Tensor:
        """Log-mel values of the autoencoder's output."""
        return (output * 0.5 + 0.5) * (self.most - self.least) + self.least


class Dcae:
    """Stereo ⇄ 10.77 frames a second of latents [8, 16].

    Args:
        weights: URLs of ``dcae`` and ``vocoder``; None for tiny random ones.
    """

    name = "dcae"
    sample_rate = SAMPLE_RATE
    channels = 2
    frame_rate = SAMPLE_RATE / HOP
    codebooks = 0
    vocabulary = 0
    timed = ("latents",)

    def __init__(self, weights: Mapping[str, str] | None) -> None:
        self._weights = weights

    @classmethod
    def open(cls, model: BaseModelSpec) -> "Dcae":
        """The codec of ``model.codec.weights``: parts ``dcae`` and ``vocoder``, read when they are first needed."""
        return cls(None if model.pretrained == "random:tiny" and not model.codec.weights else model.codec.weights)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the autoencoder's weights."""
        if self._weights is None:
            return hash_of_weights(self.autoencoder.state_dict())
        folder, _ = self._folder("dcae", "music_dcae_f8c8")
        return hash_of_weights(dict(tensors(folder / WEIGHTS)))

    @cached_property
    def autoencoder(self) -> "AutoencoderDC":
        """Part ``dcae``, on the CPU in fp32."""
        if self._weights is None:
            return random_weights(lambda: make_autoencoder(TINY_DCAE)).eval()
        folder, url = self._folder("dcae", "music_dcae_f8c8")
        config = read_json(folder / "config.json")
        return load(lambda: make_autoencoder(config), tensors(folder / WEIGHTS), url).eval()

    @cached_property
    def vocoder(self) -> Vocoder:
        """Part ``vocoder``, on the CPU in fp32."""
        if self._weights is None:
            return random_weights(lambda: Vocoder(TINY_VOCODER)).eval()
        folder, url = self._folder("vocoder", "music_vocoder")
        config = VocoderConfig.of(read_json(folder / "config.json"), url)
        return load(lambda: Vocoder(config), tensors(folder / WEIGHTS), url).eval()

    @cached_property
    def log_mel(self) -> LogMel:
        """The front end; it has nothing learned, so that encoding needs no vocoder."""
        return LogMel(VocoderConfig())

    @torch.inference_mode()
    def encode(self, audio: Float[np.ndarray, "2 N"]) -> dict[str, np.ndarray]:
        """``latents`` [8, 16, T], float16, of the whole frames of ``audio``; of one at least."""
        spectrum = self.log_mel(padded(torch.from_numpy(audio)))[None]
        latents = encode(self.autoencoder, spectrum, Scaling())[0, ..., : max(whole_frames(audio.shape[1]), 1)]
        return {"latents": latents.numpy().astype(np.float16)}

    @torch.inference_mode()
    def decode(self, arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "2 N"]:
        """Audio of ``latents`` [8, 16, T]: ``N = 4096 · T``.

        Raises:
            DataError: they are of another shape.
        """
        latents = arrays["latents"]
        if latents.shape[:2] != SHAPE:
            raise DataError(
                f"latents of shape {latents.shape} are not ACE-Step's [8, 16, T]",
                "decode them with the codec that made them",
            )
        spectrum = decode(self.autoencoder, torch.from_numpy(latents.astype(np.float32))[None], Scaling())[0]
        return torch.cat([self.vocoder(channel[None]) for channel in spectrum]).numpy()

    def _folder(self, part: str, name: str) -> tuple[Path, str]:
        place = f"model.codec.weights.{part}"
        url = (self._weights or {}).get(part)
        if url is None:
            raise UtaforgeError(
                f"{place} is not given",
                f"download the folder {name} of ACE-Step/ACE-Step-v1-3.5B from Hugging Face and write its URL there",
            )
        return local_path(url, place), url


def make_autoencoder(config: Mapping[str, Any]) -> "AutoencoderDC":
    """The autoencoder of a release's ``config.json``, untrained."""
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

    network = AutoencoderDC.from_config(dict(config))
    assert isinstance(network, AutoencoderDC)
    return network


def padded(audio: Float[Tensor, "C N"]) -> Float[Tensor, "C samples"]:
    """``audio`` with silence to a whole number of latent frames."""
    return functional.pad(audio, (0, -audio.shape[1] % HOP))


def whole_frames(samples: int) -> int:
    """Latent frames that ``samples`` fill."""
    return samples // HOP


def encode(
    network: "AutoencoderDC", log_mel: Float[Tensor, "B C M frames"], scaling: Scaling
) -> Float[Tensor, "B 8 16 T"]:
    """Latents of both channels' spectrograms."""
    return (network.encoder(scaling.given(log_mel)) - scaling.shift) * scaling.scale


def decode(
    network: "AutoencoderDC", latents: Float[Tensor, "B 8 16 T"], scaling: Scaling
) -> Float[Tensor, "B C M frames"]:
    """Spectrograms of latents."""
    return scaling.heard(network.decoder(latents / scaling.scale + scaling.shift))
