"""Golden cases: do our networks compute what upstream's compute?

``python -m trainer.families.verify DIR [DIR…]`` runs each case directory (or every one below a directory) and prints
one line an output with its relative error; the exit status is 1 if one is above the case's tolerance, or if a case
cannot be run: that is said, and the others are run all the same. A case holds ``case.json``, ``keys.json`` (every
state-dict key and shape), ``inputs.safetensors`` and ``outputs.safetensors``; weights follow from their names
(``weight``). Each family's room runs its own cases, ``golden.run``, by what is in them and whatever they are called.
"""

import hashlib
import importlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from trainer.spec.errors import UtaforgeError
from trainer.spec.families import FAMILIES
from trainer.weights import check

Network = TypeVar("Network", bound=nn.Module)
FILES = (".json", ".protos")
"""Endings of inputs and outputs that are files of their own, not tensors."""


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 tensor that rule v1 gives to state-dict ``key``.

    A standard normal draw from PCG64, seeded by the first 8 bytes of the key's SHA-256, big-endian. One-dimensional
    ``weight``, ``scale`` and ``gamma``: ``1 + 0.1 x``; others of at most one dimension: ``0.1 x``; the rest:
    ``x / sqrt(prod(shape[1:]))``.
    """
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    x = np.random.Generator(np.random.PCG64(seed)).standard_normal(size=shape, dtype=np.float32)
    if len(shape) > 1:
        x = x / math.sqrt(math.prod(shape[1:]))
    else:
        x = 1 + 0.1 * x if key.endswith(("weight", "scale", "gamma")) else 0.1 * x
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


@dataclass(frozen=True)
class Case:
    """One case directory."""

    folder: Path

    @cached_property
    def told(self) -> dict[str, Any]:
        """``case.json``."""
        file = self.folder / "case.json"
        if not file.exists():
            raise UtaforgeError(f"{self.folder} holds no case.json", "name a case directory, or one that holds some")
        return json.loads(file.read_text(encoding="utf-8"))

    @property
    def family(self) -> str:
        """Whose room runs it."""
        return self.told["family"]

    @property
    def config(self) -> dict[str, Any]:
        """The network's configuration under upstream's names."""
        return self.told["config"]

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """By name; float32 and int64 (booleans as int64)."""
        return self._tensors("inputs")

    @cached_property
    def wanted(self) -> dict[str, Tensor]:
        """Upstream's outputs by name; for a file that rooms compare themselves, the 0 that they return if it is so."""
        files = [name for name in self.told["outputs"] if name.endswith(FILES)]
        return {**dict.fromkeys(files, torch.zeros(1)), **self._tensors("outputs")}

    @cached_property
    def keys(self) -> dict[str, tuple[int, ...]]:
        """Shape of each state-dict key of upstream's network; several networks' keys are together."""
        told = json.loads((self.folder / "keys.json").read_text(encoding="utf-8"))
        return {key: tuple(shape) for key, shape in told.items()}

    def state(self, prefix: str = "") -> dict[str, Tensor]:
        """The case's weights, under the keys that begin with ``prefix``, without it; ``zeroed`` rows are zero.

        Buffers in ``fixed_buffers`` do not follow the rule and are left out.
        """
        fixed = set(self.told.get("fixed_buffers") or ())
        state = {key: weight(key, shape) for key, shape in self.keys.items() if key not in fixed}
        for key, rows in (self.told.get("zeroed") or {}).items():
            state[key][slice(None) if rows == "all" else rows] = 0
        return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}

    def fill(self, network: Network, prefix: str = "") -> Network:
        """``network`` in eval mode with the case's weights, its keys being exactly the case's.

        Raises:
            UtaforgeError: keys or shapes differ; all of them are listed.
        """
        fixed = {key.removeprefix(prefix) for key in self.told.get("fixed_buffers") or () if key.startswith(prefix)}
        state = self.state(prefix)
        own = {key: tuple(value.shape) for key, value in network.state_dict().items() if key not in fixed}
        check(own, {key: tuple(value.shape) for key, value in state.items()}, str(self.folder))
        network.load_state_dict({**network.state_dict(), **state}, strict=True)
        return network.eval()

    def tolerance(self, output: str) -> float:
        """Largest relative error of ``output``; 0 where it must be equal."""
        told = self.told["tolerance"]
        return 0.0 if output in told["exact"] else told["overrides"].get(output, told["float"])

    def _tensors(self, kind: str) -> dict[str, Tensor]:
        file = self.folder / f"{kind}.safetensors"
        told = {name for name in self.told[kind] if not name.endswith(FILES)}
        found = load_file(file) if told else {}
        if missing := sorted(told - found.keys()):
            raise UtaforgeError(f"{file} lacks {', '.join(missing)}", "copy the case again")
        return found


@dataclass(frozen=True)
class Line:
    """How one output compares.

    Attributes:
        error: ‖ours - wanted‖ / ‖wanted‖ in float64; infinite if the shape differs or there is none.
        tolerance: the most that it may be.
    """

    output: str
    error: float
    tolerance: float

    @property
    def good(self) -> bool:
        """Within the tolerance."""
        return self.error <= self.tolerance


def run(folder: Path) -> list[Line]:
    """Compare every output of a case.

    Raises:
        UtaforgeError: it is no case, something is missing in it, or our network has other keys.
    """
    case = Case(folder)
    if case.family not in FAMILIES:
        raise UtaforgeError(f"{folder}: there is no family {case.family!r}", f"known: {', '.join(FAMILIES)}")
    ours: Mapping[str, Tensor] = importlib.import_module(f"trainer.families.{case.family}.golden").run(case)
    return [Line(name, error(ours.get(name), value), case.tolerance(name)) for name, value in case.wanted.items()]


def error(ours: Tensor | None, wanted: Tensor) -> float:
    """Relative error in float64; for exact outputs any difference is more than 0."""
    if ours is None or ours.shape != wanted.shape:
        return math.inf
    difference = torch.linalg.vector_norm(ours.detach().double() - wanted.double())
    scale = torch.linalg.vector_norm(wanted.double())
    value = float(difference / scale) if scale else float(difference)
    return math.inf if math.isnan(value) else value


def cases(folders: list[Path]) -> Iterator[Path]:
    """The case directories among ``folders`` and below them; a folder that holds none is taken for a case itself."""
    for folder in folders:
        yield from sorted(file.parent for file in folder.rglob("case.json")) or [folder]


def main(arguments: list[str] | None = None) -> int:
    """Run the cases named on the command line; returns the exit status."""
    folders = [Path(name) for name in (sys.argv[1:] if arguments is None else arguments)]
    if not folders:
        sys.stderr.write("usage: python -m trainer.families.verify DIR [DIR…]\n")
        return 2
    bad = count = damaged = 0
    for folder in cases(folders):
        name = f"{folder.parent.name}/{folder.name}"
        try:
            lines = run(folder)
        except Exception as problem:  # noqa: BLE001  (whatever a damaged case raises, the others are run)
            told = str(problem) if isinstance(problem, UtaforgeError) else f"{type(problem).__name__}: {problem}"
            sys.stdout.write(f"BAD case: {name}: {told}\n")
            damaged += 1
            continue
        for line in lines:
            count, bad = count + 1, bad + (not line.good)
            verdict = "ok " if line.good else "BAD"
            limit = f"≤ {line.tolerance:.0e}" if line.tolerance else "equal"
            sys.stdout.write(f"{verdict} {f'{name} {line.output}':<56} {line.error:9.2e}  {limit}\n")
    unrun = f"; {damaged} of the cases could not be run" if damaged else ""
    sys.stdout.write(f"{count - bad} of {count} outputs are upstream's{unrun}\n")
    return 1 if bad or damaged else 0


if __name__ == "__main__":
    sys.exit(main())
