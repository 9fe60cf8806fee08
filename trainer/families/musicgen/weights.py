"""MusicGen's weights: ``builtin:pocket``, ``random:…`` or an official release; strictly loaded, saved alike."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.spec.errors import UtaforgeError
from trainer.store import open_store

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
        folder: files on this machine; none for random weights.
        config: the official ``config.json``: ``decoder`` and ``text_encoder`` are read here.
    """

    url: str
    folder: Path | None
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
        if rest not in RANDOM:
            raise UtaforgeError(
                f"model.pretrained: there is no {url!r}", f"write one of random:{', random:'.join(RANDOM)}"
            )
        return Release(
            url,
            None,
            {"decoder": RANDOM[rest], "text_encoder": {"model_type": "hashed", "d_model": RANDOM_TEXT_WIDTH[rest]}},
        )
    folder = _builtin(rest) if scheme == "builtin" else local_folder(url)
    return Release(url, folder, _read_config(folder, url))


def load_network(release: Release, dropout: float) -> "MusicGenNetwork":
    """The network on the CPU in fp32; random weights follow from a fixed seed.

    Raises:
        UtaforgeError: keys or shapes are not those of the configuration; all of them are listed.
    """
    from accelerate import init_empty_weights

    from .network import MusicGenNetwork

    config = release.decoder_config(dropout)
    if release.folder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return MusicGenNetwork(config, release.text_width)
    with init_empty_weights(include_buffers=False):
        network = MusicGenNetwork(config, release.text_width)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    state = {
        name: tensor.to(torch.float32)
        for name, tensor in read_tensors(release.folder)
        if name in expected or not name.startswith(ELSEWHERE)
    }
    _check(expected, {name: tuple(value.shape) for name, value in state.items()}, release.url)
    network.load_state_dict(state, strict=True, assign=True)
    return network


def save_network(
    release: Release,
    network: "MusicGenNetwork",
    folder: Path,
    values: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write ``network`` as a release that ``open_release`` reads back, with the other parts of ``release`` beside it.

    Args:
        release: what ``network`` was loaded from; its T5, EnCodec and tokenizer are copied.
        network: its own values count where ``values`` has none.
        folder: is made.
        values: parameters by name.
        dtype: of what is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {**network.state_dict(), **(values or {})}
    if release.folder is not None:
        state |= {name: tensor for name, tensor in read_tensors(release.folder) if name.startswith(ELSEWHERE)}
        for file in release.folder.iterdir():
            if file.suffix in (".json", ".model", ".txt") and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
    config = {"model_type": "musicgen", **release.config}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(
        {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def local_folder(url: str) -> Path:
    """A folder of this machine that holds the files at ``url`` (``file://``, ``s3://``, ``gs://``)."""
    if url.startswith("file://"):
        folder = Path(url.removeprefix("file://"))
        if not folder.is_dir():
            raise UtaforgeError(f"model.pretrained: there is no folder {folder}", "name the folder of the release")
        return folder
    home = Path(os.environ.get("UTAFORGE_HOME", ".utaforge"))
    folder = home / "cache" / "weights" / hashlib.sha256(url.encode()).hexdigest()[:16]
    store = open_store(url)
    for entry in store.list():
        target = folder / entry.path
        if "/" in entry.path or (target.exists() and target.stat().st_size == entry.bytes):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        store.download(entry.path, target)
    return folder


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a release: ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards.

    Raises:
        UtaforgeError: there is no such file, or the index names a file that is not there.
    """
    for base in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{base}.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif (folder / base).exists():
            names = [base]
        else:
            continue
        for name in names:
            yield from _tensors_of(folder / Path(name).name)
        return
    raise UtaforgeError(
        f"{folder} holds neither model.safetensors nor pytorch_model.bin (nor an index of shards)",
        "copy the whole release into one folder",
    )


def _tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    if not file.exists():
        raise UtaforgeError(f"{file} is named by the index of shards but is not there", "copy the whole release")
    if file.suffix == ".safetensors":
        yield from load_file(file).items()
    else:
        yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()


def _builtin(name: str) -> Path:
    folder = BUILTIN / name
    if not (folder / "config.json").exists():
        known = sorted(path.parent.name for path in BUILTIN.glob("*/config.json"))
        raise UtaforgeError(
            f"model.pretrained: there is no builtin:{name}", f"builtin networks: {', '.join(known) or 'none'}"
        )
    return folder


def _read_config(folder: Path, url: str) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UtaforgeError(f"{url} has no config.json", "name the folder of an official MusicGen release") from error
    except ValueError as error:
        raise UtaforgeError(f"{file} is not JSON: {error}", "copy it again") from error
    decoder = config.get("decoder") if isinstance(config, dict) else None
    if config.get("model_type") != "musicgen" or not isinstance(decoder, dict) or "text_encoder" not in config:
        raise UtaforgeError(
            f"{file} describes {config.get('model_type')!r}, not 'musicgen' with a decoder and a text_encoder",
            "name the folder of an official MusicGen release in transformers' format",
        )
    if decoder.get("audio_channels", 1) != 1:
        raise UtaforgeError(f"{url} is a stereo MusicGen", "use a mono release (musicgen-small, -medium or -large)")
    return config


def _check(expected: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], url: str) -> None:
    problems = [
        *(f"missing: {name}" for name in sorted(expected.keys() - found.keys())),
        *(f"unexpected: {name}" for name in sorted(found.keys() - expected.keys())),
        *(
            f"{name} is {found[name]}, should be {expected[name]}"
            for name in sorted(expected.keys() & found.keys())
            if expected[name] != found[name]
        ),
    ]
    if problems:
        raise UtaforgeError(
            f"the weights at {url} are not those of its config.json ({len(problems)} differences):\n  "
            + "\n  ".join(problems),
            "copy the whole release, config.json and weights of the same model",
        )
