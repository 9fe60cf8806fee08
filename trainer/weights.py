"""Files of official releases: found, read without pickle, loaded strictly, written."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.spec.errors import UtaforgeError

if TYPE_CHECKING:
    from trainer.store import Entry, Store

Network = TypeVar("Network", bound=nn.Module)
FILE = "file://"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
DESCRIBING = (".json", ".yaml", ".tiktoken", ".model", ".txt")
"""Ends of the names of files with weights, and of those that say what weights mean."""


def local_path(url: str, place: str) -> Path:
    """A file or folder of this machine that holds what is at ``url``, see ``find``.

    Args:
        url: of a release or of one of its files.
        place: where the job names it, ``model.pretrained``; for errors.

    Raises:
        UtaforgeError: there is nothing there.
    """
    path = find(url)
    if path is None:
        what = f"no {_path(url)}" if url.startswith(FILE) else f"nothing at {url}"
        raise UtaforgeError(f"{place}: there is {what}", "name the folder of the release, or its file")
    return path


def find(url: str) -> Path | None:
    """A file or folder of this machine that holds what is at ``url`` (``file://``, ``s3://``, ``gs://``), if anything.

    What lies elsewhere is copied once to a cache in which it lies as it does there: a folder without its subfolders, a
    file of weights with the configuration and the tokenizer beside it.
    """
    if url.startswith(FILE):
        path = _path(url)
        return path if path.exists() else None
    url = url.rstrip("/")
    home = Path(os.environ.get("UTAFORGE_HOME", ".utaforge"))
    local = home / "cache" / "weights" / url.replace("://", "/")
    if entries := _store(url).files():
        _download(_store(url), entries, local)
        return local
    above = parent(url)
    entries = _store(above).files() if above else []
    if above is None or local.name not in [entry.path for entry in entries]:
        return None
    beside = DESCRIBING if local.suffix in WEIGHTS else ()
    _download(_store(above), [e for e in entries if e.path == local.name or e.path.endswith(beside)], local.parent)
    return local


def parent(url: str) -> str | None:
    """The folder above ``url``; None above a bucket."""
    scheme, mark, path = url.rstrip("/").partition("://")
    return f"{scheme}{mark}{path.rpartition('/')[0]}" if "/" in path else None


def folder_of(path: Path) -> Path:
    """The folder of a release of which ``path`` is the folder, or a file."""
    return path.parent if path.is_file() else path


def tensors(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file, or of a folder's ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards.

    Args:
        path: of the file or the folder.
        wanted: whether the tensor of a name is read; shards that hold none of them need not be there.

    Raises:
        UtaforgeError: there is no such file, it is damaged, or the index names a file that is not there.
    """
    if path.is_file():
        yield from _tensors_of(path, wanted)
        return
    for base in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{base}.index.json"
        if index.exists():
            names = sorted({file for name, file in read_json(index)["weight_map"].items() if wanted(name)})
        elif (path / base).exists():
            names = [base]
        else:
            continue
        for name in names:
            yield from _tensors_of(path / Path(name).name, wanted)
        return
    raise UtaforgeError(
        f"{path} holds neither model.safetensors nor pytorch_model.bin (nor an index of shards)",
        "copy the whole release into one folder",
    )


def beside(url: str, name: str) -> Path | None:
    """The file ``name`` of the release whose folder or file of weights is at ``url``, if there is one."""
    url = url.rstrip("/")
    folder = parent(url) if url.endswith(WEIGHTS) else url
    return find(f"{folder}/{name}") if folder and "://" in url else None


def configuration(url: str) -> dict[str, Any]:
    """``config.json`` of the release whose folder or file of weights is at ``url``; empty if there is none."""
    file = beside(url, "config.json")
    return read_json(file) if file else {}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UtaforgeError: it is not there or is not one.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UtaforgeError(f"{file.parent} has no {file.name}", "name the folder of an official release") from None
    except OSError as error:
        cure = "name the folder of an official release, or its file"
        raise UtaforgeError(f"{file} cannot be read: {error.strerror}", cure) from error
    except ValueError as error:
        raise UtaforgeError(f"{file} is not JSON: {error}", "copy it again") from error
    if not isinstance(told, dict):
        raise UtaforgeError(f"{file} is not a JSON object", "copy it again")
    return told


def write_json(file: Path, told: Mapping[str, Any]) -> None:
    """Write a JSON object as releases have it."""
    file.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def load(
    make: Callable[[], Network], state: Iterable[tuple[str, Tensor]], url: str, elsewhere: tuple[str, ...] = ()
) -> Network:
    """``make()`` with the weights of ``state`` in fp32, built without memory of its own.

    Args:
        make: builds the network; its buffers that are not in the state dict are computed there.
        state: name and value of every key, renamed to the network's.
        url: where they come from, for errors.
        elsewhere: beginnings of keys that a release also holds and that are no part of this network.

    Raises:
        UtaforgeError: keys or shapes differ; all of them are listed.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        network = make()
    expected = _shapes(network.state_dict())
    found = {
        name: value.to(torch.float32) if value.is_floating_point() else value
        for name, value in state
        if name in expected or not name.startswith(elsewhere)
    }
    check(expected, _shapes(found), url)
    network.load_state_dict(found, strict=True, assign=True)
    return network


def save(state: Mapping[str, Tensor], file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write ``state``, floats as ``dtype``: safetensors, or torch's own format in ``.pt`` and ``.pth``."""
    whole = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for name, value in state.items()
    }
    if file.suffix == ".safetensors":
        save_file(whole, file, {"format": "pt"})
    else:
        torch.save(whole, file)


def random_weights(make: Callable[[], Network]) -> Network:
    """``make()`` with the random weights of its own construction, from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def check(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], url: str) -> None:
    """Raise ``UtaforgeError`` with every key that is missing, unexpected or of another shape."""
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
            f"the weights at {url} are not those of this network ({len(problems)} differences):\n  "
            + "\n  ".join(problems),
            "copy the whole release: configuration and weights of the same model",
        )


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def _path(url: str) -> Path:
    return Path(unquote(url.removeprefix(FILE)))


def _store(url: str) -> "Store":
    """Imported when it is asked for: random weights and files of this machine do without obstore."""
    from trainer.store import open_store

    return open_store(url)


def _download(store: "Store", entries: Iterable["Entry"], folder: Path) -> None:
    for entry in entries:
        target = folder / entry.path
        if not target.exists() or target.stat().st_size != entry.bytes:
            store.download(entry.path, target)


def _tensors_of(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    if not file.exists():
        raise UtaforgeError(f"{file} is named by the index of shards but is not there", "copy the whole release")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as told:
                found = {name: told.get_tensor(name) for name in told.keys() if wanted(name)}  # noqa: SIM118
        else:
            found = {name: value for name, value in _unpickled(file).items() if wanted(name)}
    except Exception as error:
        raise UtaforgeError(f"{file} cannot be read: {error}", "copy it again") from error
    yield from found.items()


def _unpickled(file: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint, at its top or under ``state_dict``; each is read from the file when it is used."""
    told = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return told.get("state_dict", told)
