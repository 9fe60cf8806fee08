"""HeartCodec: 12.5 frames a second of 8 codes → 48 kHz stereo (HeartMuLa, https://arxiv.org/abs/2601.10547).

Only decoding is public: what made the codes of the release (MuEncoder, WavLM, Whisper and a query compressor) is not.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.shapes import Float, Int, Integer
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.model import BaseModelSpec
from trainer.weights import folder_of, load, local_path, random_weights, read_json, tensors

from .base import hash_of_codebooks
from .heartcodec_network import HeartCodecConfig, HeartCodecNetwork

FRAME_RATE = 12.5
WINDOW_SECONDS, STEPS, GUIDANCE = 29.76, 10, 1.25
"""Upstream's defaults (``HeartCodec.detokenize``, HeartMuLa/heartlib@3981c52)."""
HOP = 80, 93
"""A window begins 80/93 of a window after the one before."""
ENCODER = "scalar_model.encoder."
TINY = HeartCodecConfig(
    dim=32,
    codebook_size=1024,
    codebook_dim=8,
    attention_head_dim=16,
    in_channels=32 + 2 * 32,
    num_attention_heads=2,
    num_layers=1,
    num_layers_2=1,
    out_channels=32,
    sample_rate=16_000,
    upsample_factors=(5, 4, 4, 4),
    upsample_kernel_sizes=(10, 8, 8, 8),
    latent_hidden_dim=16,
    init_channel=2,
)
"""Configuration of ``random:tiny``: 8 codebooks of 1,024, as the tiny HeartMuLa has."""
Noise = Callable[[tuple[int, int, int]], Float[Tensor, "1 L D"]]
"""Shape → where the flow of the next window begins."""


class HeartCodec:
    """Codes → stereo.

    Args:
        config: of the release.
        weights: its file or folder; None for random weights.
        url: where they come from, for errors.
    """

    name = "heartcodec"
    channels = 2
    frame_rate = FRAME_RATE
    timed = ("codes",)

    def __init__(self, config: HeartCodecConfig, weights: Path | None, url: str) -> None:
        self._config, self._weights, self._url = config, weights, url
        self.sample_rate = config.sample_rate
        self.codebooks = config.num_quantizers
        self.vocabulary = config.codebook_size

    @classmethod
    def open(cls, model: BaseModelSpec) -> "HeartCodec":
        """The codec in ``model.codec.weights["heartcodec"]``: the folder of an official release.

        Raises:
            UtaforgeError: none is given, or it is another codec's.
        """
        url = model.codec.weights.get("heartcodec")
        if url is None and model.pretrained == "random:tiny":
            return cls(TINY, None, model.pretrained)
        if url is None:
            raise UtaforgeError(
                "model.codec.weights.heartcodec is not given",
                "download HeartMuLa/HeartCodec-oss-20260123 and name its folder there",
            )
        path = local_path(url, "model.codec.weights.heartcodec")
        file = folder_of(path) / "config.json"
        told = read_json(file)
        if told.get("model_type") != "heartcodec" or not told.get("causal", True):
            raise UtaforgeError(
                f"{file} describes {told.get('model_type')!r}, not a causal 'heartcodec'",
                "name the folder of HeartMuLa/HeartCodec-oss-20260123",
            )
        return cls(read_config(told), path, url)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the codebooks, by which codes are told apart."""
        state = tensors(self._weights, _is_codebook) if self._weights else self.network.state_dict().items()
        books = {name: value for name, value in state if _is_codebook(name)}
        return hash_of_codebooks(books, self.codebooks, self._url)

    @cached_property
    def network(self) -> HeartCodecNetwork:
        """The decoders, on the CPU in fp32 (upstream advises against bf16)."""

        def make() -> HeartCodecNetwork:
            return HeartCodecNetwork(self._config)

        if self._weights is None:
            return random_weights(make).eval()
        return load(make, tensors(self._weights), self._url, (ENCODER,)).eval()

    def encode(self, audio: Float[np.ndarray, "2 N"]) -> dict[str, np.ndarray]:
        """Refuses: nothing public makes these codes. For ``random:tiny``, a stand-in: see ``stand_in_codes``.

        Raises:
            DataError: always, with real weights.
        """
        if self._weights is None:
            return {"codes": stand_in_codes(audio, self._config)}
        raise DataError(
            "HeartCodec has no public encoder, so audio cannot become its codes",
            "give codes beside the audio (SONG.tokens.npy, as HeartMuLa's own generations come with)",
        )

    @torch.inference_mode()
    def decode(self, arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "2 N"]:
        """Audio of ``codes`` [K, T]; the same codes give the same sound.

        Raises:
            DataError: a code is not in the codebooks.
        """
        codes = arrays["codes"].astype(np.int64)
        if not codes.size:
            return np.zeros((2, 0), np.float32)
        if len(codes) != self.codebooks or codes.min() < 0 or codes.max() >= self.vocabulary:
            raise DataError(
                f"codes of shape {codes.shape}, {codes.min()} to {codes.max()}, are not this HeartCodec's",
                "decode them with the codec that made them",
            )
        draw = torch.Generator().manual_seed(0)
        latents = window_latents(
            self.network, torch.from_numpy(codes), lambda shape: torch.randn(shape, generator=draw)
        )
        return joined(self.network, latents, codes.shape[1]).numpy()


def read_config(told: Mapping[str, object]) -> HeartCodecConfig:
    """The configuration in an official ``config.json``."""
    known = {field.name for field in fields(HeartCodecConfig)}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items() if name in known}
    return replace(HeartCodecConfig(), **given)


def stand_in_codes(audio: Float[np.ndarray, "2 N"], config: HeartCodecConfig) -> Integer[np.ndarray, "K T"]:
    """No HeartCodec codes, only something to rehearse with: how loud each eighth of a frame is, from -120 to 0 dB."""
    part = round(config.sample_rate / FRAME_RATE / config.num_quantizers)
    mono = audio.mean(0)
    frames = -(-len(mono) // (part * config.num_quantizers))
    parts = np.pad(mono, (0, frames * config.num_quantizers * part - len(mono))).reshape(
        frames, config.num_quantizers, part
    )
    level = 10 * np.log10(np.square(parts).mean(-1) + 1e-12)
    codes = (1 + level / 120) * config.codebook_size
    return np.clip(codes, 0, config.codebook_size - 1).astype(np.uint16).T


def window_latents(
    network: HeartCodecNetwork,
    codes: Int[Tensor, "K T"],
    noise: Noise,
    seconds: float = WINDOW_SECONDS,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Iterator[Float[Tensor, "L D"]]:
    """Latents of overlapping windows, each continuing the one before.

    Codes are repeated from their beginning until they fill the last window. (Upstream forgets that last window where
    the number of codes is a multiple of the hop plus twice the overlap: there it loses the end of the song.)

    Args:
        network: decodes.
        codes: of the song.
        noise: where the flow of each window begins.
        seconds: of a window.
        steps: of the flow.
        guidance: of the flow.
    """
    size, hop = _window(seconds * FRAME_RATE)
    windows = max(math.ceil((codes.shape[1] - (size - hop)) / hop), 1)
    flow = network.flow_matching
    latents = torch.zeros(1, 0, network.config.out_channels)
    for start in range(0, windows * hop, hop):
        window = codes[:, torch.arange(start, start + size) % codes.shape[1]]
        begin = noise((1, 2 * size, network.config.out_channels))
        latents = flow(window[None], begin, latents[:, 2 * hop :], steps, guidance)
        yield latents[0]


def joined(
    network: HeartCodecNetwork, windows: Iterator[Float[Tensor, "L D"]], frames: int, seconds: float = WINDOW_SECONDS
) -> Float[Tensor, "2 N"]:
    """The waveform of ``frames`` code frames, windows joined by linear cross-fades."""
    rate = network.config.sample_rate
    size, hop = _window(seconds * rate)
    fade = torch.linspace(0, 1, size - hop, dtype=torch.float64)
    sound = torch.zeros(2, 0)
    for latents in windows:
        wave = network.waveform(latents)[:, :size]
        if sound.shape[1]:
            mixed = (sound[:, hop - size :] * (1 - fade) + wave[:, : size - hop] * fade).to(wave.dtype)
            sound = torch.cat([sound[:, : hop - size], mixed, wave[:, size - hop :]], 1)
        else:
            sound = wave
    return sound[:, : int(frames / FRAME_RATE * rate)]


def _is_codebook(name: str) -> bool:
    return name.endswith("_codebook.embed")


def _window(units: float) -> tuple[int, int]:
    """Window and hop in whole units."""
    return int(units), int(units) // HOP[1] * HOP[0]
