"""Songs that nobody sang: random ids, latents and conditions, where a network has to have something to compute on."""

from collections.abc import Mapping, Sequence

import numpy as np

from .base import Example, Family

TEXT: Mapping[str, str] = {
    "tags": "祭り, koto, female vocal",
    "lyrics": "[verse] s a k u r a . [chorus] h a n a . y u k i",
}
WORDS = 16
"""Hidden states of the tags, where a family's rows have them."""


def songs(family: Family, lengths: Sequence[int], draw: np.random.Generator) -> list[Example]:
    """Whole songs of so many frames, each with the text ``TEXT`` and its own number as seed."""
    return [
        Example(f"歌{index}", family.made_up(frames, draw), TEXT, seed=index) for index, frames in enumerate(lengths)
    ]


def codes(family: Family, frames: int, draw: np.random.Generator) -> np.ndarray:
    """Ids [K, T] that the network knows, uint16."""
    return draw.integers(0, family.vocabulary, (family.codebooks, frames)).astype(np.uint16)


def latents(draw: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal numbers, float16."""
    return draw.standard_normal(shape, np.float32).astype(np.float16)


def ids(draw: np.random.Generator, known: int) -> np.ndarray:
    """Tokens [WORDS] of a text, int32."""
    return draw.integers(0, known, WORDS).astype(np.int32)
