"""Songs and tokenizers that the tests of families make."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from trainer.codecs import open_codec
from trainer.families import open_family
from trainer.families.base import Arrays, Example, Family
from trainer.spec.families import FAMILIES, Model
from trainer.spec.job import Sampling

TEXT = {"tags": "祭り, koto, female vocal", "lyrics": "[verse] s a k u r a . [chorus] h a n a"}
SECONDS = 2.0


def sung(model: Model) -> list[Example]:
    """Two songs of noise for a tiny network, encoded by its own codec."""
    family, codec = open_family(model), open_codec(model)
    noise = np.random.default_rng(0).normal(0, 0.1, (2, codec.channels, round(SECONDS * codec.sample_rate)))
    return examples(family, [codec.encode(audio.astype(np.float32)) for audio in noise], TEXT)


def examples(family: Family, songs: Sequence[Arrays], *texts: Mapping[str, str]) -> list[Example]:
    """Songs of these arrays; they take the texts in turn, and their own number as seed."""
    own = [texts[index % len(texts)] for index in range(len(songs))]
    rows = zip(songs, own, family.conditions(own), strict=True)
    return [
        Example(f"歌{index}", {**song, **conditions}, text, seed=index)
        for index, (song, text, conditions) in enumerate(rows)
    ]


def sampling(family: str, **given: Any) -> Sampling:
    """As a job of ``family`` that says no more than ``given`` has it."""
    return Sampling(**{**FAMILIES[family].sampling, **given})


def random_codes(books: int, entries: int, lengths: Sequence[int]) -> list[Arrays]:
    draw = np.random.default_rng(0)
    return [{"codes": draw.integers(0, entries, (books, length)).astype(np.uint16)} for length in lengths]


def word_tokenizer(words: Sequence[str], unknown: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer
