"""What a codec is: audio ⇄ codes."""

from typing import Protocol

import numpy as np
from jaxtyping import Float, Int


class Codec(Protocol):
    """Audio ⇄ codes, single device, numpy at the boundary.

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

    def encode(self, audio: Float[np.ndarray, "C N"]) -> Int[np.ndarray, "K T"]:
        """Codes of ``audio`` (at ``sample_rate`` with ``channels`` channels, floats in [-1, 1])."""
        ...

    def decode(self, codes: Int[np.ndarray, "K T"]) -> Float[np.ndarray, "C N"]:
        """Audio of ``codes``."""
        ...
