"""What a codec is: audio ⇄ codes or latents."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from trainer.shapes import Float


class Codec(Protocol):
    """Audio ⇄ arrays of a shard row (``codes``, ``latents``, …), single device, numpy at the boundary.

    ``K`` codebooks, ``T`` frames, ``C`` channels, ``N`` samples.
    """

    name: str
    fingerprint: str
    """Hash of the weights: shards made with other weights are refused."""
    sample_rate: int
    channels: int
    frame_rate: float
    codebooks: int
    vocabulary: int
    """Entries in each codebook. Both are 0 where there are only latents."""
    timed: tuple[str, ...]
    """Arrays whose last axis is time, an entry a frame; the loader cuts them into segments together."""

    def encode(self, audio: Float[np.ndarray, "C N"]) -> dict[str, np.ndarray]:
        """Arrays of ``audio`` (``channels`` channels at ``sample_rate``, floats in [-1, 1]), as shards keep them."""
        ...

    def decode(self, arrays: Mapping[str, np.ndarray]) -> Float[np.ndarray, "C N"]:
        """Audio of such arrays."""
        ...
