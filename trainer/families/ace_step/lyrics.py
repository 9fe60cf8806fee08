"""Lyrics → tokens: upstream's vocabulary of romanised text, and a hashed stand-in for random weights.

Each line is ``[language]text`` with ``[SPACE]`` for a space, and ends with ``LINE_END``; structure tags (``[verse]``)
are taken as English: ace-step/ACE-Step@d612523f50e252c0e138e68ae75b06223f96e934, ``lyrics_utils/lyric_tokenizer.py``.

The vocabulary knows Latin letters alone. Japanese is romanised: by ``cutlet`` where it is installed, else kana by kana
(Hepburn), which leaves kanji unread. Other scripts have to be romanised by whoever prepares the songs. Upstream guesses
the language of each line; here it is ``ja`` for the kana and kanji of songs that have kana, ``en`` elsewhere.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from trainer.shapes import Int
from trainer.spec.errors import DataError, UtaforgeError
from trainer.weights import local_path

from .weights import Release

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, LINE_END, UNKNOWN = 261, 2, 1
MAX_TOKENS = 4096
VOWELS = "aiueo"
ROWS = {
    **{"": "あいうえお", "k": "かきくけこ", "g": "がぎぐげご", "s": "さ すせそ", "z": "ざ ずぜぞ"},
    **{"t": "た  てと", "d": "だ  でど", "n": "なにぬねの", "h": "はひ へほ", "b": "ばびぶべぼ"},
    **{"p": "ぱぴぷぺぽ", "m": "まみむめも", "y": "や ゆ よ", "r": "らりるれろ", "w": "わ"},
}
IRREGULAR = {
    **{"し": "shi", "じ": "ji", "ち": "chi", "ぢ": "ji", "つ": "tsu", "づ": "zu", "ふ": "fu", "を": "o", "ん": "n"},
    **{"ゔ": "vu"},
}
KANA = IRREGULAR | {
    kana: row + VOWELS[place] for row, kanas in ROWS.items() for place, kana in enumerate(kanas) if kana != " "
}
SMALL = {"ゃ": "ya", "ゅ": "yu", "ょ": "yo", "ぁ": "a", "ぃ": "i", "ぅ": "u", "ぇ": "e", "ぉ": "o"}
DOUBLED, LONG = "っ", "ー"
PUNCTUATION = str.maketrans({**dict.fromkeys("・「」『』（）　", " "), "、": ", ", "。": ". ", "！": "! ", "？": "? "})


class LyricTokenizer(Protocol):
    """Lyrics → tokens."""

    def __call__(self, lyrics: str) -> Int[np.ndarray, " M"]:
        """Tokens, int32; none for no lyrics."""
        ...


def open_lyric_tokenizer(release: Release, vocabulary: str | None) -> LyricTokenizer:
    """The tokenizer with the vocabulary at that URL; random weights need none.

    Raises:
        UtaforgeError: it is not given.
    """
    if vocabulary is not None:
        return BpeLyrics(local_path(vocabulary, "model.lyric_vocabulary"))
    if release.hashed:
        return HashedLyrics(release.config.lyric_encoder_vocab_size)
    raise UtaforgeError(
        "model.lyric_vocabulary is not given",
        "download acestep/models/lyrics_utils/vocab.json from github.com/ace-step/ACE-Step and write its URL there",
    )


class HashedLyrics:
    """Each character is a token, by its number; nothing is learned."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def __call__(self, lyrics: str) -> Int[np.ndarray, " M"]:
        """One token a character, 1 … vocabulary - 1."""
        return np.array([1 + ord(letter) % (self.vocabulary - 1) for letter in lyrics[:MAX_TOKENS]], np.int32)


class BpeLyrics:
    """Upstream's byte-pair vocabulary.

    Args:
        file: ``vocab.json``, in the format of ``tokenizers``.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, lyrics: str) -> Int[np.ndarray, " M"]:
        """Tokens of all lines, blank ones too.

        Raises:
            DataError: a line cannot be written in the vocabulary, or there are more tokens than the network takes.
        """
        if not lyrics.strip():
            return np.zeros(0, np.int32)
        japanese = re.search("[ぁ-ヿ]", lyrics) is not None
        lines = [line.strip() for line in lyrics.strip().splitlines()]
        ids = [START, *(token for line in lines for token in self._line(line, japanese))]
        if len(ids) > MAX_TOKENS:
            raise DataError(
                f"the lyrics are {len(ids)} tokens long, the network takes {MAX_TOKENS}", "cut the song or its lyrics"
            )
        return np.array(ids, np.int32)

    def _line(self, line: str, japanese: bool) -> Iterator[int]:
        if line:
            japanese = japanese and re.search("[ぁ-ヿ一-鿿]", line) is not None
            text = " ".join((romanised(line) if japanese else line).lower().replace('"', "").split())
            ids = self._tokenizer.encode(f"[{'ja' if japanese else 'en'}]{text}".replace(" ", "[SPACE]")).ids
            if UNKNOWN in ids:
                raise DataError(
                    f"the lyric vocabulary cannot write the line {line!r}",
                    "write it in Latin letters or kana, numbers as words (kanji need `pip install cutlet unidic-lite`)",
                )
            yield from ids
        yield LINE_END

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(self.file))
        except Exception as error:
            raise UtaforgeError(
                f"model.lyric_vocabulary: {self.file} is no vocabulary: {error}", "copy vocab.json again"
            ) from error


def romanised(line: str) -> str:
    """Japanese in Latin letters.

    >>> romanised("さくら、キャット　ちょっと ラーメン")
    'sakura, kyatto chotto raamen'
    """
    if find_spec("cutlet"):
        return import_module("cutlet").Cutlet().romaji(line)
    return _hepburn("".join(chr(ord(c) - 0x60) if "ァ" <= c <= "ヴ" else c for c in line).translate(PUNCTUATION))


def _hepburn(kana: str) -> str:
    found = ""
    doubled = False
    for letter in kana:
        if letter == DOUBLED:
            doubled = True
            continue
        if letter in SMALL and found:
            found = found[:-1] + _glided(found, SMALL[letter])
        elif letter == LONG:
            found += found[-1:]
        else:
            latin = KANA.get(letter, letter)
            found += ("t" if latin.startswith("c") else latin[:1]) * doubled + latin
        doubled = False
    return found


def _glided(before: str, small: str) -> str:
    """What a small kana makes of the vowel before it: ``ki`` + ``ya`` = ``kya``, ``shi`` + ``ya`` = ``sha``."""
    return small[1:] if small[0] == "y" and before.endswith(("shi", "chi", "ji")) else small
