"""Tags and lyrics → the rows of text that a song begins with."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.shapes import Int
from trainer.spec.errors import UtaforgeError
from trainer.weights import folder_of, local_path

from .weights import Release

if TYPE_CHECKING:
    from .network import HeartMuLaConfig

Tokenize = Callable[[str], list[int]]
"""Text → ids; begin and end of text may be missing."""


def open_tokenizer(release: Release, override: str | None) -> Tokenize:
    """Llama 3's, from the file at URL ``override`` or of ``release``; UTF-8 bytes for networks made up here.

    Raises:
        UtaforgeError: there is no such file.
    """
    if override is not None:
        return _tokenizer(local_path(override, "model.tokenizer"))
    if release.path is None or release.told.get("backbone_flavor") == "tiny":
        return utf8
    file = release.file("tokenizer.json")
    if file is None:
        raise UtaforgeError(
            f"neither {folder_of(release.path)} nor the folder above it has tokenizer.json",
            "copy it from HeartMuLa/HeartMuLaGen, or name it in model.tokenizer",
        )
    return _tokenizer(file)


def utf8(text: str) -> list[int]:
    """The bytes of ``text``.

    >>> utf8("歌")
    [230, 173, 140]
    """
    return list(text.encode())


def prompt_rows(
    tags: str, lyrics: str, tokenize: Tokenize, config: "HeartMuLaConfig"
) -> tuple[Int[Tensor, "S K1"], int]:
    """Rows of tags, the slot of the reference audio and lyrics; and which row is the slot.

    Both are lower-case, each between begin and end of text; tags stand between ``<tag>`` and ``</tag>``
    (``preprocess``, ``src/heartlib/pipelines/music_generation.py``, HeartMuLa/heartlib@3981c52).
    """
    marked = tags.lower()
    marked = marked if marked.startswith("<tag>") else f"<tag>{marked}"
    marked = marked if marked.endswith("</tag>") else f"{marked}</tag>"
    before = _bounded(tokenize(marked), config)
    after = _bounded(tokenize(lyrics.lower()), config)
    ids = torch.tensor([*before, 0, *after])
    return torch.nn.functional.pad(ids[:, None], (config.audio_num_codebooks, 0)), len(before)


def _bounded(ids: list[int], config: "HeartMuLaConfig") -> list[int]:
    begin, end = config.text_bos_id, config.text_eos_id
    ids = ids if ids[:1] == [begin] else [begin, *ids]
    return ids if ids[-1] == end else [*ids, end]


def _tokenizer(file: Path) -> Tokenize:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise UtaforgeError(
            f"{file} is not a tokenizer: {error}", "copy tokenizer.json of the release again"
        ) from error
    return lambda text: tokenizer.encode(text).ids
