"""Files of official releases: found, read without pickle, loaded strictly, written."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.spec.errors import UtaforgeError

if TYPE_CHECKING:
    from trainer.store import Store

Network = TypeVar("Network", bound=nn.Module)


def local_path(url: str, place: str) -> Path:
    """A file or folder of this machine that holds what is at ``url`` (``file://``, ``s3://``, ``gs://``).

    What lies elsewhere is copied to the cache once, a folder without its subfolders.

    Args:
        url: of a release or of one of its files.
        place: where the job names it, ``model.pretrained``; for errors.

    Raises:
        UtaforgeError: there is nothing there.
    """
    if url.startswith("file://"):
        path = Path(unquote(url.removeprefix("file://")))
        if not path.exists():
            raise UtaforgeError(f"{place}: there is no {path}", "name the folder of the release, or its file")
        return path
    home = Path(os.environ.get("UTAFORGE_HOME", ".utaforge"))
    folder = home / "cache" / "weights" / hashlib.sha256(url.encode()).hexdigest()[:16]
    store = _store(url)
    entries = [entry for entry in store.list() if "/" not in entry.path]
    if not entries:
        return _single_file(url, place, folder)
    for entry in entries:
        _download(store, entry.path, folder / entry.path, entry.bytes)
    return folder


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file, or of a folder's ``model.safetensors`` or ``pytorch_model.bin``, whole or in shards.

    Raises:
        UtaforgeError: there is no such file, it is damaged, or the index names a file that is not there.
    """
    if path.is_file():
        yield from _tensors_of(path)
        return
    for base in ("model.safetensors", "pytorch_model.bin"):
        index = path / f"{base}.index.json"
        if index.exists():
            names = sorted(set(read_json(index)["weight_map"].values()))
        elif (path / base).exists():
            names = [base]
        else:
            continue
        for name in names:
            yield from _tensors_of(path / Path(name).name)
        return
    raise UtaforgeError(
        f"{path} holds neither model.safetensors nor pytorch_model.bin (nor an index of shards)",
        "copy the whole release into one folder",
    )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UtaforgeError: it is not there or is not one.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UtaforgeError(f"{file.parent} has no {file.name}", "name the folder of an official release") from None
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


def _single_file(url: str, place: str, folder: Path) -> Path:
    parent, _, name = url.rpartition("/")
    store = _store(parent)
    entry = next((entry for entry in store.list() if entry.path == name), None)
    if entry is None:
        raise UtaforgeError(f"{place}: there is nothing at {url}", "name the folder of the release, or its file")
    _download(store, name, folder / name, entry.bytes)
    return folder / name


def _store(url: str) -> "Store":
    """Imported when it is asked for: random weights and files of this machine do without obstore."""
    from trainer.store import open_store

    return open_store(url)


def _download(store: "Store", path: str, target: Path, size: int) -> None:
    if target.exists() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    store.download(path, target)


def _tensors_of(file: Path) -> Iterator[tuple[str, Tensor]]:
    if not file.exists():
        raise UtaforgeError(f"{file} is named by the index of shards but is not there", "copy the whole release")
    try:
        told = load_file(file) if file.suffix == ".safetensors" else _unpickled(file)
    except Exception as error:
        raise UtaforgeError(f"{file} cannot be read: {error}", "copy it again") from error
    yield from told.items()


def _unpickled(file: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint, be they at its top or under ``state_dict``."""
    told = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return told.get("state_dict", told)
