"""SongBloom's weights: ``random:…`` or an official release; strictly loaded, saved alike.

A release is ``NAME.pt`` (or ``NAME.safetensors``) beside ``NAME.yaml`` and ``vocab_g2p.yaml``. Its keys have the prefix
``model.``, beside which there may be the VAE's (``vae.``); without any prefix they are read as well.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from trainer.spec.errors import UtaforgeError
from trainer.weights import beside, find, load, local_path, random_weights, save, tensors

from .config import SongBloomConfig, from_upstream, to_upstream

if TYPE_CHECKING:
    from .network import SongBloom

NAME = "songbloom"
"""Of the files that are written here."""
VOCABULARY = "vocab_g2p.yaml"
PREFIX, VAE_PREFIX = "model.", "vae."
SUFFIXES = (".pt", ".safetensors")
CURE = "name the folder with one release in it, or its .pt file, with its .yaml and vocab_g2p.yaml beside it"
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_MARKS = ("", "[intro]", "[verse]", "[chorus]", "[bridge]", "[inst]", "[outro]", ",", ".", "?", "!", "-", "SP")
_PHONES = ("cl", "ky", "gy", "sh", "ch", "ts", "ny", "hy", "by", "py", "my", "ry", *ascii_letters)
_FULL = SongBloomConfig(
    dim=1536,
    heads=24,
    ffn=6144,
    plan_layers=36,
    flow_layers=12,
    block=16,
    latent_dim=64,
    pitches=16_384,
    rotary_base=20_000,
    time_features=256,
    init_std=0.02,
    h_dropout=0.05,
    prompt_dropout=0.1,
    tokens=tuple([*_MARKS, *_PHONES, *(f"<{index}>" for index in range(257))][:257]),
    lyric_length=600,
    sentences=50,
    prompt_length=250,
    max_seconds=150.0,
)
RANDOM = {
    "tiny": replace(
        _FULL, dim=64, heads=2, ffn=128, plan_layers=2, flow_layers=2, latent_dim=4, pitches=256, lyric_length=64
    ),
    "full": _FULL,
}
"""``random:full`` is songbloom_full_150s in shape; of its 257 tokens enough are named to write Japanese phones."""


@dataclass(frozen=True)
class Release:
    """Where weights are and how they are shaped; nothing is loaded yet.

    Attributes:
        url: ``model.pretrained``.
        file: of the weights, on this machine; none for random ones.
        config: of the network.
    """

    url: str
    file: Path | None
    config: SongBloomConfig


def open_release(url: str) -> Release:
    """The release at ``url``, its files brought to this machine if they are not there yet.

    Raises:
        UtaforgeError: there is no SongBloom at ``url``.
    """
    scheme, _, rest = url.partition(":")
    if scheme == "random":
        return Release(url, None, RANDOM[rest])
    if not url.endswith(SUFFIXES):
        return _only_release(url, local_path(url, "model.pretrained"))
    folder, _, name = url.rpartition("/")

    def file(name: str) -> Path:
        return local_path(f"{folder}/{name}", "model.pretrained")

    return Release(url, file(name), _read_config(file(f"{Path(name).stem}.yaml"), file))


def is_release(url: str) -> bool:
    """Whether there is a SongBloom at ``url``, by the names of its files."""
    if url.endswith(SUFFIXES):
        return beside(url, f"{Path(url).stem}.yaml") is not None
    folder = find(url) if "://" in url else None
    return bool(folder and _releases(folder))


def load_network(release: Release) -> "SongBloom":
    """The network on the CPU in fp32; random weights follow from a fixed seed.

    Raises:
        UtaforgeError: keys or shapes are not those of the configuration; all of them are listed.
    """
    from .network import SongBloom

    def make() -> SongBloom:
        return SongBloom(release.config)

    if release.file is None:
        return random_weights(make)
    return load(make, _state(release.file), release.url, (VAE_PREFIX,))


def save_network(release: Release, network: "SongBloom", folder: Path, values: Mapping[str, Tensor]) -> None:
    """See ``Family.save``: a release that ``open_release``, and upstream, reads back, with the VAE of ``release``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"{PREFIX}{name}": value for name, value in {**network.state_dict(), **values}.items()}
    if release.file is not None:
        state |= dict(tensors(release.file, lambda name: name.startswith(VAE_PREFIX)))
    save(state, folder / f"{NAME}.pt")
    told = {"max_dur": release.config.max_seconds, "model": to_upstream(release.config)}
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(told, allow_unicode=True, sort_keys=False), encoding="utf-8")


def _releases(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.suffix in SUFFIXES and file.with_suffix(".yaml").exists())


def _only_release(url: str, folder: Path) -> Release:
    found = _releases(folder)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UtaforgeError(f"model.pretrained: {url} holds {len(found)} releases ({names})", CURE)
    return Release(url, found[0], _read_config(found[0].with_suffix(".yaml"), lambda name: folder / name))


def _read_config(file: Path, beside: Callable[[str], Path]) -> SongBloomConfig:
    told = _read_yaml(file, yaml.SafeLoader)
    model = _resolved(told.get("model"), told) if isinstance(told, dict) else None
    if not isinstance(model, dict):
        raise UtaforgeError(f"{file} has no section model", CURE)
    lyrics = model.get("condition_provider_cfg", {}).get("lyrics", {})
    if not isinstance(lyrics.get("vocab_list"), list):
        lyrics["vocab_list"] = _read_vocabulary(beside(VOCABULARY))
    return from_upstream(model, float(told.get("max_dur", _FULL.max_seconds)))


def _read_vocabulary(file: Path) -> list[str]:
    """A list of tokens, alone or as the only value; as text throughout, since ``on`` and ``1`` are tokens as well."""
    told = _read_yaml(file, yaml.BaseLoader)
    if isinstance(told, dict) and len(told) == 1:
        [told] = told.values()
    if not isinstance(told, list) or not all(isinstance(token, str) for token in told):
        raise UtaforgeError(f"{file} is not a list of tokens", "copy vocab_g2p.yaml of the release again")
    return told


def _read_yaml(file: Path, loader: Any) -> Any:
    try:
        return yaml.load(file.read_text(encoding="utf-8"), loader)  # noqa: S506  (safe and base loaders alone)
    except OSError as error:
        raise UtaforgeError(f"model.pretrained: {file} cannot be read: {error.strerror}", CURE) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UtaforgeError(f"{file} is not YAML: {error}", "copy it again") from error


def _resolved(value: Any, root: Mapping[str, Any]) -> Any:
    """``value`` with OmegaConf's references (``${model.dim}``) replaced; those that need code stay as they are."""
    if isinstance(value, dict):
        return {key: _resolved(inner, root) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolved(inner, root) for inner in value]
    if not isinstance(value, str) or not (match := _REFERENCE.fullmatch(value)):
        return value
    found: Any = root
    for name in match[1].split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return value if found is None or found == value else _resolved(found, root)


def _state(file: Path) -> Iterator[tuple[str, Tensor]]:
    for name, value in tensors(file):
        yield name.removeprefix(PREFIX), value
