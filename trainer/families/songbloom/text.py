"""Lyrics as ids: phones, structure tags and punctuation, divided by single spaces.

``[verse] s a k u r a . s a k u r a , [chorus] …``: a tag begins a structure, ``.`` ends a sentence, ``,`` a structure.
Each position is the sum of three embeddings: its token, the structure it is in (a tag's or a mark's own id), and the
number of its sentence in that structure (https://arxiv.org/abs/2506.07634, section 3; released phoneme tokenizer,
tencent-ailab/SongBloom@ef78022).
"""

import logging
from collections import Counter
from collections.abc import Sequence

import numpy as np

from trainer.shapes import Int

log = logging.getLogger(__name__)
NO_TOKEN = -1
NAMED = 20
"""Unknown tokens that a warning names."""


class Vocabulary:
    """Tokens of lyrics by id.

    Args:
        tokens: in the release's order; the first is the empty one.
        sentences: sentence numbers at or above it share the last one.
    """

    def __init__(self, tokens: Sequence[str], sentences: int) -> None:
        self._ids = {token: index for index, token in reversed(list(enumerate(tokens)))}
        self._tags = {index for token, index in self._ids.items() if token.startswith("[") and token.endswith("]")}
        self._stops = {self._ids[mark] for mark in (".",) if mark in self._ids}
        self._marks = {self._ids[mark] for mark in (".", ",") if mark in self._ids} | self._tags
        self._sentences = sentences

    def encode(self, lyrics: str) -> tuple[Int[np.ndarray, " L"], Counter[str]]:
        """Ids of ``lyrics``, and the tokens that are not in the vocabulary and so left out.

        No lyrics are one empty token, and two spaces in a row hold one, as upstream. In lyrics of several lines any
        white space divides.
        """
        tokens = lyrics.split() if "\n" in lyrics else lyrics.split(" ")
        unknown = Counter(token for token in tokens if token not in self._ids)
        return np.array([self._ids[token] for token in tokens if token in self._ids], np.int64), unknown

    def annotate(self, ids: Int[np.ndarray, " L"]) -> Int[np.ndarray, "3 L"]:
        """Token, structure and sentence of each position."""
        structure, sentence = 0, 1
        rows: list[tuple[int, int, int]] = []
        for token in ids.tolist():
            if token in self._tags:
                structure, sentence = token, 1
            if token in self._marks:
                rows.append((token, token, 0))
                sentence += token in self._stops
            else:
                rows.append((token, structure, min(sentence, self._sentences - 1)))
        return np.array(rows, np.int64).reshape(-1, 3).T


def lyric_ids(vocabulary: Vocabulary, lyrics: str, positions: int) -> Int[np.ndarray, " L"]:
    """Ids of phonemised ``lyrics``; a warning names what is lost: unknown tokens, and all beyond ``positions``."""
    ids, unknown = vocabulary.encode(lyrics)
    if unknown:
        named = ", ".join(f"{token!r} ×{count}" for token, count in unknown.most_common(NAMED))
        log.warning(
            "lyrics %.40r: %d of %d tokens are not in the vocabulary and are left out: %s; write phones of the "
            "release's vocab_g2p.yaml, divided by spaces",
            lyrics,
            unknown.total(),
            unknown.total() + len(ids),
            named,
        )
    if len(ids) > positions:
        log.warning("lyrics %.40r: %d tokens, only the first %d are heard", lyrics, len(ids), positions)
    return ids


def lyric_batch(annotated: Sequence[Int[np.ndarray, "3 L"]]) -> Int[np.ndarray, "B 3 L"]:
    """Several songs' annotated ids, filled up on the right with ``NO_TOKEN``."""
    batch = np.full((len(annotated), 3, max(song.shape[1] for song in annotated)), NO_TOKEN, np.int64)
    for row, song in zip(batch, annotated, strict=True):
        row[:, : song.shape[1]] = song
    return batch
