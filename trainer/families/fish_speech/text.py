"""Text → token ids, and the prompts of both versions.

1.4 has a ``tokenizer.json`` (read by ``tokenizers``), 1.5 a ``tokenizer.tiktoken``: byte-pair ranks, merged here.
Upstream: fishaudio/fish-speech@58046ea (v1.5.1), fish_speech/tokenizer.py and fish_speech/text/clean.py; what 1.4 does
with each character and with rows of them, and how it lays out a prompt, is what v1.4.3 (@1359896) gave when it was run.
"""

import base64
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import regex
import torch
from torch import Tensor

from trainer.shapes import Int
from trainer.spec.errors import UtaforgeError

SEMANTIC_IDS = 1024
"""Tokens of 1.5 that mark an audio frame, whatever the codebooks' size."""
SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|placeholder:{index}|>" for index in range(4)),
    *("<|text|>", "<|voice|>", "<|interleave|>"),
    *(f"<|semantic:{code}|>" for code in range(SEMANTIC_IDS)),
)
"""Special tokens of 1.5 in the order of their ids, which follow the ranks."""
PIECES = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"\p{P}",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(\?!\S)",
        r"\s+",
    )
)
r"""What 1.5 splits a text into before merging; no token crosses a border. ``\?`` is upstream's slip, and trained on."""
_EMOJI = re.compile("[\U0001f600-\U0001f64f\U0001f300-\U0001f5ff\U0001f680-\U0001f6ff\U0001f1e0-\U0001f1ff]+")
_MARKS = {
    "1.4": str.maketrans(
        {
            **dict.fromkeys("‘’“”「」《》", "'"),
            **dict.fromkeys(":;：；", ","),
            "…": ".",
            **dict.fromkeys("()[]（）【】~～—·・"),
        }
    ),
    "1.5": str.maketrans(dict.fromkeys("‘’", "'")),
}
"""What each version writes for a mark; None leaves it out."""
_ROWS = {"1.4": ",.", "1.5": ","}
"""Marks of which a row is cut to its first."""


def clean(text: str, version: str) -> str:
    """A text as upstream packs and cleans it: on one line, without emoji, its marks as the version knows them.

    >>> clean(" さくら…  「さくら」,,🎵", "1.4")
    "さくら. 'さくら',"
    >>> clean(" さくら…  「さくら」,,🎵", "1.5")
    'さくら… 「さくら」,'
    """
    line = _EMOJI.sub("", " ".join(text.split()).translate(_MARKS[version]))
    row = f"[{_ROWS[version]}]"
    return re.sub(f"({row}){row}+", r"\1", line)


class Tokenizer(ABC):
    """Token ids of one version.

    Attributes:
        version: ``1.4`` or ``1.5``.
        end: id of ``<|im_end|>``.
        semantic: ids that mark an audio frame.
    """

    version: str
    end: int
    semantic: range

    @abstractmethod
    def __call__(self, text: str) -> list[int]:
        """Ids of ``text``, special tokens in it included."""

    @property
    def shift(self) -> int:
        """What the network's codes are ahead of the codec's: 1 in 1.4, where 0 is padding."""
        return 1 if self.version == "1.4" else 0

    @property
    def system(self) -> str:
        """What stands before the first turn, in 1.5 alone."""
        return "" if self.version == "1.4" else "<|im_start|>system\nSpeak out the provided text.<|im_end|>"

    def turn(self, text: str, speaker: str) -> str:
        """A text and the head of its answer, the audio; a speaker answers under a name of his own in 1.4 alone."""
        answer = f"{speaker or 'assistant'}\n" if self.version == "1.4" else "assistant\n<|voice|>"
        return f"<|im_start|>user\n{clean(text, self.version)}<|im_end|><|im_start|>{answer}"

    def unlearned(self, length: int) -> int:
        """How many tokens of a prompt are not learned: the first in 1.4, all but the last in 1.5."""
        return 1 if self.version == "1.4" else length - 1

    def frame_tokens(self, codes: Int[Tensor, "K T"]) -> Int[Tensor, " T"]:
        """The token of each audio frame: always the same in 1.4, one for each first code in 1.5."""
        start = torch.full_like(codes[0], self.semantic.start)
        return start if self.version == "1.4" else start + codes[0]


class Bytes(Tokenizer):
    """A stand-in for networks with random weights: a token for each UTF-8 byte.

    Args:
        version: ``1.4`` or ``1.5``.
        vocabulary: of the network, at least ``Bytes.least(version)``.
    """

    end = 4
    _first = 16

    def __init__(self, version: str, vocabulary: int) -> None:
        self.version = version
        self.semantic = range(5, 6) if version == "1.4" else range(vocabulary - SEMANTIC_IDS, vocabulary)

    @classmethod
    def least(cls, version: str) -> int:
        """The smallest vocabulary that has all tokens."""
        return cls._first + 256 + (0 if version == "1.4" else SEMANTIC_IDS)

    def __call__(self, text: str) -> list[int]:
        """Ids of the bytes; ``<|im_start|>``, ``<|im_end|>`` and ``<|voice|>`` have ids of their own."""
        special = {b"<|im_start|>": [3], b"<|im_end|>": [self.end], b"<|voice|>": [6]}
        pieces = re.split(b"(<\\|im_start\\|>|<\\|im_end\\|>|<\\|voice\\|>)", text.encode())
        return [each for piece in pieces for each in special.get(piece) or [self._first + byte for byte in piece]]


class Json(Tokenizer):
    """1.4's ``tokenizer.json``.

    Args:
        file: of the release.

    Raises:
        UtaforgeError: it cannot be read or lacks the tokens of a prompt.
    """

    version = "1.4"

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Fast

        try:
            self._fast = Fast.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise UtaforgeError(f"{file} cannot be read: {error}", "copy it from the release again") from error
        end, semantic = self._fast.token_to_id("<|im_end|>"), self._fast.token_to_id("<|semantic|>")
        if end is None or semantic is None:
            raise UtaforgeError(f"{file} has no <|im_end|> or no <|semantic|>", "copy it from a release of 1.4")
        self.end, self.semantic = end, range(semantic, semantic + 1)

    def __call__(self, text: str) -> list[int]:
        """Ids, without the tokens that ``tokenizers`` may put around a text."""
        return self._fast.encode(text, add_special_tokens=False).ids


class Ranks(Tokenizer):
    """1.5's ``tokenizer.tiktoken``: each line a token in base64 and its rank, which is its id.

    Args:
        file: of the release.

    Raises:
        UtaforgeError: it cannot be read.
    """

    version = "1.5"

    def __init__(self, file: Path) -> None:
        try:
            pairs = [line.split() for line in file.read_text(encoding="ascii").splitlines() if line]
            self._ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
        except (OSError, ValueError) as error:
            raise UtaforgeError(f"{file} cannot be read: {error}", "copy it from the release again") from error
        self._special = {name: len(self._ranks) + index for index, name in enumerate(SPECIAL)}
        self.end = self._special["<|im_end|>"]
        first = self._special["<|semantic:0|>"]
        self.semantic = range(first, first + SEMANTIC_IDS)
        self._borders = regex.compile("(" + "|".join(map(regex.escape, SPECIAL)) + ")")
        self._pieces = regex.compile(PIECES)
        self._merged = lru_cache(maxsize=1 << 16)(lambda piece: merged(piece, self._ranks))

    def __call__(self, text: str) -> list[int]:
        """Ids; special tokens written in the text count as such (upstream allows them all)."""
        ids: list[int] = []
        for part in self._borders.split(text):
            if part in self._special:
                ids.append(self._special[part])
            else:
                ids.extend(each for piece in self._pieces.finditer(part) for each in self._merged(piece[0].encode()))
        return ids


def merged(piece: bytes, ranks: Mapping[bytes, int]) -> list[int]:
    """Byte-pair encoding: the neighbours whose union has the lowest rank are joined, again and again.

    Source: Sennrich et al. 2015, https://arxiv.org/abs/1508.07909, on bytes.
    """
    parts = [piece[index : index + 1] for index in range(len(piece))] if piece not in ranks else [piece]
    while len(parts) > 1:
        unions = [ranks.get(left + right, len(ranks)) for left, right in pairwise(parts)]
        best = min(unions)
        if best == len(ranks):
            break
        at = unions.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]
