"""fish-speech's weights: ``random:…`` or an official release; strictly loaded, saved alike."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.families.fish_speech.spec import FishSpeech
from trainer.spec.errors import UtaforgeError
from trainer.weights import folder_of, load, local_path, random_weights, read_json, save, tensors, write_json

from .network import Config, FishSpeechNetwork
from .text import Bytes, Json, Ranks, Tokenizer

TOKENIZERS = {"1.4": "tokenizer.json", "1.5": "tokenizer.tiktoken"}
"""The file by which a release's version is known."""
WEIGHTS = "model.pth"
BYTES = "byte_tokenizer"
"""Key of a configuration whose text is read byte by byte: that of ``random:…``, which knows no language."""
_SHARED = {
    BYTES: True,
    "model_type": "dual_ar",
    "rope_base": 1e6,
    "norm_eps": 1e-6,
    "dropout": 0.0,
    "codebook_size": 1024,
    "num_codebooks": 8,
    "initializer_range": 0.02,
}
_TINY = {
    "dim": 64,
    "n_layer": 2,
    "n_fast_layer": 1,
    "n_head": 4,
    "n_local_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_seq_len": 4096,
}
_FULL = {
    "dim": 1024,
    "n_layer": 24,
    "n_fast_layer": 4,
    "n_head": 16,
    "n_local_heads": 2,
    "head_dim": 64,
    "intermediate_size": 4096,
}
RANDOM = {
    ("tiny", "1.4"): {**_SHARED, **_TINY, "vocab_size": Bytes.least("1.4")},
    ("tiny", "1.5"): {**_SHARED, **_TINY, "vocab_size": Bytes.least("1.5")},
    ("full", "1.4"): {**_SHARED, **_FULL, "vocab_size": 32_000, "max_seq_len": 4096, "dropout": 0.1},
    ("full", "1.5"): {**_SHARED, **_FULL, "vocab_size": 102_048, "max_seq_len": 8192},
}
"""Configurations of random networks; ``full`` is that of the releases."""


@dataclass(frozen=True)
class Release:
    """Where weights are and how they are shaped; nothing is loaded yet.

    Attributes:
        url: ``model.pretrained``.
        version: ``1.4`` or ``1.5``.
        path: the release's folder on this machine, or the file of its weights; none for random ones.
        told: upstream's ``config.json``.
    """

    url: str
    version: str
    path: Path | None
    told: Mapping[str, Any]

    @property
    def config(self) -> Config:
        """The network's configuration."""
        return Config.read(self.told)

    @property
    def folder(self) -> Path | None:
        """Where the files beside the weights are."""
        return folder_of(self.path) if self.path else None

    def tokenizer(self) -> Tokenizer:
        """The release's tokenizer; a stand-in for networks made up here.

        Raises:
            UtaforgeError: the tokenizer of this version is not in the release, or of another vocabulary.
        """
        if self.folder is None or self.told.get(BYTES):
            return Bytes(self.version, self.told["vocab_size"])
        file = self.folder / TOKENIZERS[self.version]
        if not file.exists():
            others = [other for other, name in TOKENIZERS.items() if (self.folder / name).exists()]
            raise UtaforgeError(
                f"{self.folder} has no {file.name}, by which fish-speech {self.version} is known",
                f"write model.version: '{others[0]}'" if others else "copy it from the release beside the weights",
            )
        tokenizer = Json(file) if self.version == "1.4" else Ranks(file)
        if tokenizer.semantic.stop > self.told["vocab_size"]:
            raise UtaforgeError(
                f"{file} has tokens up to {tokenizer.semantic.stop - 1}, the network knows {self.told['vocab_size']}",
                "use weights and tokenizer of the same release",
            )
        return tokenizer


def open_release(model: FishSpeech) -> Release:
    """The release of a job's ``model:`` section, its files brought to this machine if they are not there yet.

    Raises:
        UtaforgeError: there is no fish-speech 1.4 or 1.5.
    """
    scheme, _, size = model.pretrained.partition(":")
    if scheme == "random":
        return Release(model.pretrained, model.version, None, RANDOM[size, model.version])
    path = local_path(model.pretrained, "model.pretrained")
    return Release(model.pretrained, model.version, path, read_json(folder_of(path) / "config.json"))


def load_network(release: Release, semantic: range) -> FishSpeechNetwork:
    """The network on the CPU in fp32; random weights follow from a fixed seed.

    Raises:
        UtaforgeError: keys or shapes are not those of the configuration; all of them are listed.
    """

    def make() -> FishSpeechNetwork:
        return FishSpeechNetwork(release.config, semantic)

    if release.path is None:
        return random_weights(make)
    return load(make, _state(release.path), release.url)


def save_network(release: Release, network: FishSpeechNetwork, folder: Path, values: Mapping[str, Tensor]) -> None:
    """See ``Family.save``: a release that upstream and ``open_release`` read, with the tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    if release.folder is not None:
        for file in release.folder.glob("*token*"):
            shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", release.told)
    save({**network.state_dict(), **values}, folder / WEIGHTS)


def _state(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights; in a checkpoint of upstream's trainer ``model.`` stands before every key."""
    file = path / WEIGHTS
    for name, value in tensors(file if file.exists() else path):
        yield name.removeprefix("model."), value
