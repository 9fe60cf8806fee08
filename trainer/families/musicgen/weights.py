"""MusicGen's weights: ``builtin:pocket``, ``random:…`` or an official release; strictly loaded, saved alike."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trainer.spec.errors import UtaforgeError
from trainer.weights import folder_of, load, local_path, random_weights, read_json, save, tensors, write_json

if TYPE_CHECKING:
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    from .network import MusicGenNetwork

BUILTIN = Path(__file__).parents[2] / "builtin"
ELSEWHERE = ("text_encoder.", "audio_encoder.", "decoder.model.decoder.embed_positions.")
"""Parts of a release that this network does not hold: T5 (``text.py``), EnCodec (a codec), and the sinusoidal positions
that older releases store though they follow from a formula."""
RANDOM = {
    "tiny": {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 128, "num_attention_heads": 4},
    "full": {
        "vocab_size": 2048,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "ffn_dim": 8192,
        "num_attention_heads": 32,
    },
}
RANDOM_TEXT_WIDTH = {"tiny": 64, "full": 768}


@dataclass(frozen=True)
class Release:
    """Where weights are and how they are shaped; nothing is loaded yet.

    Attributes:
        url: ``model.pretrained``.
        path: the release's folder on this machine, or the file of its weights; none for random ones.
        config: the official ``config.json``: ``decoder`` and ``text_encoder`` are read here.
    """

    url: str
    path: Path | None
    config: dict[str, Any]

    @property
    def text_width(self) -> int:
        """Width of the text encoder's hidden states."""
        return self.config["text_encoder"]["d_model"]

    def decoder_config(self, dropout: float) -> "MusicgenDecoderConfig":
        """The decoder's configuration with the job's ``dropout`` in place of the released one."""
        from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

        off = {"attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0}
        decoder = {**self.config["decoder"], **off, "dropout": dropout}
        decoder["pad_token_id"] = decoder["bos_token_id"] = decoder["vocab_size"]
        return MusicgenDecoderConfig(**decoder)


def open_release(url: str) -> Release:
    """The release at ``url``, its files brought to this machine if they are not there yet.

    Raises:
        UtaforgeError: there is no MusicGen (mono) at ``url``.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "random":
        text = {"model_type": "hashed", "d_model": RANDOM_TEXT_WIDTH[rest]}
        return Release(url, None, {"decoder": RANDOM[rest], "text_encoder": text})
    path = BUILTIN / rest if scheme == "builtin" else local_path(url, "model.pretrained")
    return Release(url, path, _read_config(folder_of(path), url))


def load_network(release: Release, dropout: float) -> "MusicGenNetwork":
    """The network on the CPU in fp32; random weights follow from a fixed seed.

    Raises:
        UtaforgeError: keys or shapes are not those of the configuration; all of them are listed.
    """
    from .network import MusicGenNetwork

    config = release.decoder_config(dropout)

    def make() -> MusicGenNetwork:
        return MusicGenNetwork(config, release.text_width)

    if release.path is None:
        return random_weights(make)
    return load(make, tensors(release.path), release.url, ELSEWHERE)


def save_network(
    release: Release,
    network: "MusicGenNetwork",
    folder: Path,
    values: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """See ``Family.save``: a release that ``open_release`` reads back, with T5, EnCodec and tokenizer, in ``dtype``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {**network.state_dict(), **values}
    if release.path is not None:
        state |= dict(tensors(release.path, lambda name: name.startswith(ELSEWHERE)))
        for file in folder_of(release.path).iterdir():
            if file.suffix in (".json", ".model", ".txt") and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", {"model_type": "musicgen", **release.config})
    save(state, folder / "model.safetensors", dtype)


def _read_config(folder: Path, url: str) -> dict[str, Any]:
    file = folder / "config.json"
    config = read_json(file)
    decoder = config.get("decoder")
    if config.get("model_type") != "musicgen" or not isinstance(decoder, dict) or "text_encoder" not in config:
        raise UtaforgeError(
            f"{file} describes {config.get('model_type')!r}, not 'musicgen' with a decoder and a text_encoder",
            "name the folder of an official MusicGen release in transformers' format",
        )
    if decoder.get("audio_channels", 1) != 1:
        raise UtaforgeError(f"{url} is a stereo MusicGen", "use a mono release (musicgen-small, -medium or -large)")
    return config
