"""ACE-Step's weights: ``random:…`` or the official release; strictly loaded, saved alike."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.weights import find, load, local_path, random_weights, read_json, save, tensors, write_json

from .network import AceStepNetwork, Config

PART = "ace_step_transformer"
"""The transformer's folder in the release; it may be named itself."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
FULL = {
    "num_layers": 24,
    "inner_dim": 2560,
    "num_attention_heads": 20,
    "attention_head_dim": 128,
    "mlp_ratio": 2.5,
    "in_channels": 8,
    "out_channels": 8,
    "patch_size": [16, 1],
    "max_height": 16,
    "max_width": 32_768,
    "max_position": 32_768,
    "rope_theta": 1_000_000.0,
    "speaker_embedding_dim": 512,
    "text_embedding_dim": 768,
    "ssl_encoder_depths": [8, 8],
    "ssl_names": ["mert", "m-hubert"],
    "ssl_latent_dims": [1024, 768],
    "lyric_encoder_vocab_size": 6693,
    "lyric_hidden_size": 1024,
}
TINY = {
    **FULL,
    "num_layers": 2,
    "inner_dim": 32,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "speaker_embedding_dim": 16,
    "text_embedding_dim": 32,
    "ssl_encoder_depths": [1, 1],
    "ssl_latent_dims": [8, 8],
    "lyric_encoder_vocab_size": 256,
    "lyric_hidden_size": 32,
    "lyric_layers": 2,
    "lyric_heads": 2,
    "lyric_ffn": 64,
}
HASHED = "hashed_conditions"
"""Key of a configuration whose tags and lyrics are hashed: those of ``random:…``, which know no language."""
RANDOM = {name: {**told, HASHED: True} for name, told in (("tiny", TINY), ("full", FULL))}


@dataclass(frozen=True)
class Release:
    """Where weights are and how they are shaped; nothing is loaded yet.

    Attributes:
        url: ``model.pretrained``.
        weights: their file on this machine; none for random weights.
        told: ``config.json``.
    """

    url: str
    weights: Path | None
    told: Mapping[str, Any]

    @cached_property
    def config(self) -> Config:
        """The network's configuration."""
        return Config.of(self.told, self.url)

    @property
    def hashed(self) -> bool:
        """Whether tags and lyrics are hashed, because the network knows no language."""
        return bool(self.told.get(HASHED))


def open_release(url: str) -> Release:
    """The release at ``url`` (its folder, its transformer's folder, or the file in it), copied here if it is elsewhere.

    Raises:
        UtaforgeError: there is no ACE-Step at ``url``.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "random":
        return Release(url, None, RANDOM[rest])
    path = find(f"{url}/{PART}") or local_path(url, "model.pretrained")
    file = path if path.is_file() else path / WEIGHTS
    return Release(url, file, read_json(file.parent / "config.json"))


def load_network(release: Release) -> AceStepNetwork:
    """The network on the CPU in fp32; random weights follow from a fixed seed.

    Raises:
        UtaforgeError: keys or shapes are not those of the configuration; all of them are listed.
    """
    config = release.config
    if release.weights is None:
        return random_weights(lambda: AceStepNetwork(config))
    return load(lambda: AceStepNetwork(config), tensors(release.weights), release.url)


def save_network(release: Release, network: AceStepNetwork, folder: Path, values: Mapping[str, Tensor]) -> None:
    """See ``Family.save``: a folder that ``open_release`` reads back, in place of ``ace_step_transformer``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"_class_name": "ACEStepTransformer2DModel", **release.told})
    save({**network.state_dict(), **values}, folder / WEIGHTS)
