"""EnCodec (Défossez et al. 2022, https://arxiv.org/abs/2210.13438) as ``transformers`` has it, for MusicGen: 32 kHz.

Long songs are coded in overlapping windows, so that memory stays bounded: every frame sees ``CONTEXT_SECONDS`` of what
surrounds it. (Its LSTMs remember further back than that in principle; in effect they do not.)
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainer.shapes import Float, Int
from trainer.spec.errors import DataError, UtaforgeError
from trainer.spec.model import BaseModelSpec
from trainer.weights import folder_of, load, local_path, random_weights, read_json, tensors

from .base import hash_of_codebooks

if TYPE_CHECKING:
    from transformers import EncodecConfig, EncodecModel

PREFIX = "audio_encoder."
"""Under which a MusicGen release holds its EnCodec."""
CODEBOOK = "codebook.embed"
"""End of the name of a codebook."""
TINY = {
    "sampling_rate": 32_000,
    "audio_channels": 1,
    "target_bandwidths": [1.6],
    "upsampling_ratios": [8, 5, 4, 4],
    "num_filters": 4,
    "hidden_size": 16,
    "codebook_size": 256,
    "codebook_dim": 16,
    "num_lstm_layers": 1,
    "use_causal_conv": False,
    "norm_type": "weight_norm",
}
"""Configuration of ``random:tiny``: 4 codebooks of 256, as the tiny MusicGen has."""
WINDOW_SECONDS, CONTEXT_SECONDS = 60.0, 1.0


class Encodec:
    """Mono ⇄ 50 frames a second of residual codes.

    Args:
        config: of the release.
        weights: its file or folder; None for random weights.
        url: where they come from, for errors.
    """

    name = "encodec"
    channels = 1
    timed = ("codes",)

    def __init__(self, config: "EncodecConfig", weights: Path | None, url: str) -> None:
        self._config, self._weights, self._url = config, weights, url
        self.sample_rate = config.sampling_rate
        self.frame_rate = config.sampling_rate / config.hop_length
        self.codebooks = config.num_quantizers
        self.vocabulary = config.codebook_size

    @classmethod
    def open(cls, model: BaseModelSpec) -> "Encodec":
        """The codec in ``model.codec.weights["encodec"]``, else the one inside ``model.pretrained``.

        Raises:
            UtaforgeError: there is no EnCodec for mono.
        """
        from transformers import EncodecConfig

        if model.pretrained == "random:tiny" and not model.codec.weights:
            return cls(EncodecConfig(**TINY), None, model.pretrained)
        place = "model.codec.weights.encodec" if "encodec" in model.codec.weights else "model.pretrained"
        url = model.codec.weights.get("encodec", model.pretrained)
        if not url.startswith(("file:", "s3:", "gs:")):
            raise UtaforgeError(
                f"model.codec.weights.encodec is not given and {url} holds no EnCodec",
                "download facebook/encodec_32khz and name its folder there",
            )
        path = local_path(url, place)
        told = read_json(folder_of(path) / "config.json")
        config = EncodecConfig(**told.get("audio_encoder", told))
        if config.audio_channels != 1 or config.normalize or config.chunk_length_s:
            raise UtaforgeError(
                f"{url} is not MusicGen's EnCodec: it is for {config.audio_channels} channels or codes in chunks",
                "name the folder of facebook/encodec_32khz",
            )
        return cls(config, path, url)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the codebooks, by which codes are told apart."""
        state = self._state(CODEBOOK) if self._weights else self.model.state_dict().items()
        books = {name: value for name, value in state if name.endswith(CODEBOOK)}
        return hash_of_codebooks(books, self.codebooks, self._url)

    @cached_property
    def model(self) -> "EncodecModel":
        """The network, on the CPU in fp32."""
        from transformers import EncodecModel

        if self._weights is None:
            return random_weights(lambda: EncodecModel(self._config)).eval()
        return load(lambda: EncodecModel(self._config), map(_renamed, self._state()), self._url).eval()

    def encode(self, audio: Float[np.ndarray, "1 N"]) -> dict[str, np.ndarray]:
        """``codes`` [K, T] of ``audio``: ``T = ceil(N / hop)``."""
        hop = self._config.hop_length
        frames = -(-audio.shape[1] // hop)
        padded = torch.from_numpy(np.pad(audio[0], (0, frames * hop - audio.shape[1])))
        parts = [
            self._encode(padded[first * hop : last * hop])[:, begin - first : begin - first + count]
            for begin, count, first, last in self._windows(frames)
        ]
        codes = torch.cat(parts, 1) if parts else torch.zeros(self.codebooks, 0)
        return {"codes": codes.numpy().astype(np.min_scalar_type(self.vocabulary - 1))}

    def decode(self, arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "1 N"]:
        """Audio of ``codes`` [K, T]: ``N = hop · T``.

        Raises:
            DataError: a code is not in the codebooks.
        """
        codes = arrays["codes"].astype(np.int64)
        if codes.size and not (len(codes) == self.codebooks and codes.min() >= 0 and codes.max() < self.vocabulary):
            raise DataError(
                f"codes of shape {codes.shape}, {codes.min()} to {codes.max()}, are not this EnCodec's",
                "decode them with the codec that made them",
            )
        hop = self._config.hop_length
        parts = [
            self._decode(torch.from_numpy(codes[:, first:last]))[(begin - first) * hop :][: count * hop]
            for begin, count, first, last in self._windows(codes.shape[1])
        ]
        return (torch.cat(parts) if parts else torch.zeros(0)).numpy()[None]

    def _state(self, end: str = "") -> Iterator[tuple[str, Tensor]]:
        """Tensors of the release that are EnCodec's and whose names end so."""
        assert self._weights is not None
        prefix = PREFIX if "audio_encoder" in read_json(folder_of(self._weights) / "config.json") else ""
        for name, value in tensors(self._weights, lambda name: name.startswith(prefix) and name.endswith(end)):
            yield name.removeprefix(prefix), value

    def _windows(self, frames: int) -> list[tuple[int, int, int, int]]:
        """(first frame wanted, how many, first frame seen, end of what is seen) of each window."""
        size, context = round(WINDOW_SECONDS * self.frame_rate), round(CONTEXT_SECONDS * self.frame_rate)
        return [
            (begin, min(size, frames - begin), max(begin - context, 0), min(begin + size + context, frames))
            for begin in range(0, frames, size)
        ]

    @torch.inference_mode()
    def _encode(self, samples: Float[Tensor, " N"]) -> Int[Tensor, "K T"]:
        return encode(self.model, samples[None, None])[0]

    @torch.inference_mode()
    def _decode(self, codes: Int[Tensor, "K T"]) -> Float[Tensor, " N"]:
        return decode(self.model, codes[None])[0, 0]


def encode(model: "EncodecModel", samples: Float[Tensor, "B 1 N"]) -> Int[Tensor, "B K T"]:
    """Codes of whole waveforms."""
    return model.quantizer.encode(model.encoder(samples), None).transpose(0, 1)


def decode(model: "EncodecModel", codes: Int[Tensor, "B K T"]) -> Float[Tensor, "B 1 N"]:
    """Waveforms of codes."""
    return model.decoder(model.quantizer.decode(codes.transpose(0, 1)))


def _renamed(entry: tuple[str, Tensor]) -> tuple[str, Tensor]:
    """Older releases name a weight norm's magnitude and direction ``weight_g`` and ``weight_v``."""
    name, value = entry
    for old, new in (
        ("weight_g", "parametrizations.weight.original0"),
        ("weight_v", "parametrizations.weight.original1"),
    ):
        if name.endswith(f".{old}"):
            return name.removesuffix(old) + new, value
    return name, value
