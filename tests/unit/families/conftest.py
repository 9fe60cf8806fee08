"""Songs and tokenizers that the tests of families make."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from trainer.codecs import open_codec
from trainer.families import open_family
from trainer.families.ace_step.family import AceStepFamily
from trainer.families.ace_step.spec import AceStep
from trainer.families.ace_step.weights import HASHED, PART
from trainer.families.base import Arrays, Example, Family
from trainer.families.fish_speech.text import Json
from trainer.families.fish_speech.weights import BYTES
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


def fish_speech_release(folder: Path, version: str = "") -> None:
    """Make a release of saved random weights, with the tokenizer of ``version``."""
    told = json.loads((folder / "config.json").read_text())
    told.pop(BYTES, None)
    (folder / "config.json").write_text(json.dumps(told))
    if version == "1.5":
        lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
        (folder / "tokenizer.tiktoken").write_text("\n".join(lines))
    if version == "1.4":
        tokenizer = word_tokenizer(["歌", "<unk>"], "<unk>")
        tokenizer.add_special_tokens(["<|im_end|>", "<|semantic|>"])
        tokenizer.save(str(folder / "tokenizer.json"))
        assert Json(folder / "tokenizer.json")("歌<|im_end|>") == [0, 2]


def ace_step_release(top: Path) -> Path:
    """A tiny ACE-Step as upstream's release has it, with a UMT5 in a folder of its own; returns ``top``."""
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    family = AceStepFamily(AceStep(family="ace_step", pretrained="random:tiny"))
    family.save(family.network(), top / PART, {})
    told = json.loads((top / PART / "config.json").read_text())
    told.pop(HASHED)
    (top / PART / "config.json").write_text(json.dumps(told))
    config = UMT5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=32, num_layers=10, num_heads=4)
    UMT5EncoderModel(config).save_pretrained(top / "umt5-base")
    words = word_tokenizer(["<pad>", "</s>", "童謡", "piano"], "<pad>")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(top / "umt5-base")
    return top
