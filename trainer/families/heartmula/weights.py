"""HeartMuLa's weights: ``random:…`` or an official release; strictly loaded, saved alike."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trainer.spec.errors import UtaforgeError
from trainer.weights import (
    find,
    folder_of,
    load,
    local_path,
    parent,
    random_weights,
    read_json,
    save,
    tensors,
    write_json,
)

from .llama import LlamaConfig

if TYPE_CHECKING:
    from .network import HeartMuLaConfig, HeartMuLaNetwork

FLAVORS = {
    "llama-3B": LlamaConfig(28, 24, 8, 3072, 8192, 8192),
    "llama-300M": LlamaConfig(3, 8, 4, 3072, 8192, 2048),
    "tiny": LlamaConfig(2, 4, 2, 64, 128, 8192),
}
"""Stacks that a release names (``modeling_heartmula.py``, HeartMuLa/heartlib@3981c52), and a tiny one of our own."""
TINY = {
    "backbone_flavor": "tiny",
    "decoder_flavor": "tiny",
    "text_vocab_size": 258,
    "audio_vocab_size": 1029,
    "muq_dim": 16,
    "text_bos_id": 256,
    "text_eos_id": 257,
    "audio_eos_id": 1025,
}
FULL = {"backbone_flavor": "llama-3B", "decoder_flavor": "llama-300M"}
RANDOM: Mapping[str, Mapping[str, Any]] = {"tiny": TINY, "full": FULL}
BESIDE = ("tokenizer.json", "gen_config.json")
"""Files that upstream keeps in the folder above the weights."""


@dataclass(frozen=True)
class Release:
    """Where weights are and how they are shaped; nothing is loaded yet.

    Attributes:
        url: ``model.pretrained``.
        path: the release's folder on this machine, or the file of its weights; none for random ones.
        told: ``config.json`` and the ids of ``gen_config.json``.
    """

    url: str
    path: Path | None
    told: Mapping[str, Any]

    @property
    def config(self) -> "HeartMuLaConfig":
        """The network's configuration."""
        from .network import HeartMuLaConfig

        stacks = {stack: FLAVORS[self.told[f"{stack}_flavor"]] for stack in ("backbone", "decoder")}
        known = {field.name for field in fields(HeartMuLaConfig)} - stacks.keys()
        return HeartMuLaConfig(**stacks, **{name: self.told[name] for name in known & self.told.keys()})

    def file(self, name: str) -> Path | None:
        """A file beside the weights or in the folder above them, if it is there; of random weights, none."""
        if self.path is None:
            return None
        beside = folder_of(self.path) / name
        folder = parent(self.url) if self.path.is_file() else self.url
        above = parent(folder) if folder else None
        if beside.exists():
            return beside
        return find(f"{above}/{name}") if above else None


def open_release(url: str) -> Release:
    """The release at ``url``, its files brought to this machine if they are not there yet.

    Raises:
        UtaforgeError: there is no HeartMuLa at ``url``.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "random":
        return Release(url, None, RANDOM[rest])
    path = local_path(url, "model.pretrained")
    file = folder_of(path) / "config.json"
    told = read_json(file)
    flavors = told.get("backbone_flavor"), told.get("decoder_flavor")
    if told.get("model_type") != "heartmula" or not FLAVORS.keys() >= set(flavors):
        raise UtaforgeError(
            f"{file} describes {told.get('model_type')!r} of flavors {flavors}, not a HeartMuLa of "
            f"{', '.join(FLAVORS)}",
            "name the folder of HeartMuLa/HeartMuLa-oss-3B-happy-new-year",
        )
    ids = Release(url, path, told).file("gen_config.json")
    return Release(url, path, {**told, **(read_json(ids) if ids else {})})


def load_network(release: Release) -> "HeartMuLaNetwork":
    """The network on the CPU in fp32; random weights follow from a fixed seed.

    Raises:
        UtaforgeError: keys or shapes are not those of the configuration; all of them are listed.
    """
    from .network import HeartMuLaNetwork

    def make() -> HeartMuLaNetwork:
        return HeartMuLaNetwork(release.config)

    if release.path is None:
        return random_weights(make)
    return load(make, tensors(release.path), release.url)


def save_network(release: Release, network: "HeartMuLaNetwork", folder: Path, values: Mapping[str, Tensor]) -> None:
    """See ``Family.save``: a release that ``open_release`` reads back, with the tokenizer beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in BESIDE:
        if file := release.file(name):
            shutil.copyfile(file, folder / name)
    write_json(folder / "config.json", {"model_type": "heartmula", **release.told})
    save({**network.state_dict(), **values}, folder / "model.safetensors")
