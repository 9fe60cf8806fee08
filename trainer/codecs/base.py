"""What a codec is: audio ⇄ codes or latents."""

import hashlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from torch import Tensor

from trainer.shapes import Float
from trainer.spec.errors import UtaforgeError


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


def hash_of_codebooks(books: Mapping[str, Tensor], count: int, url: str) -> str:
    """Fingerprint of codes by the codebooks that they are looked up in, as fp32, in the order of their names.

    Args:
        books: every one, by the name of its tensor.
        count: how many there have to be.
        url: where they come from, for errors.

    Raises:
        UtaforgeError: there are others than these.
    """
    if len(books) != count:
        raise UtaforgeError(f"{url} holds {len(books)} codebooks, this codec has {count}", "copy the whole release")
    told = b"".join(books[name].float().numpy().tobytes() for name in sorted(books))
    return hashlib.sha256(told).hexdigest()[:16]


def hash_of_weights(state: Mapping[str, Tensor]) -> str:
    """Fingerprint of a codec by whatever decides its codes: names and values, as fp32, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + (value.float() if value.is_floating_point() else value).numpy().tobytes())
    return digest.hexdigest()[:16]
