"""Hardware shapes: what a job may ask for by name, each a YAML file.

A profile is looked for beside the job (``profiles/NAME.yaml``), in ``~/.config/utaforge/profiles``, then among the
built-in ones in this folder, which are also the examples for one's own.
"""

import json
import os
import shutil
import subprocess
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from trainer.spec import JobError
from trainer.spec.base import PositiveFloat, PositiveInt, Spec
from trainer.spec.explain import schema_faults
from trainer.spec.yaml import read

GIB = 1 << 30
_SHIPPED = Path(__file__).parent


class Price(Spec):
    """What one machine costs."""

    machine: str
    """Provider, machine and region."""
    usd_per_hour: PositiveFloat
    """On demand."""
    spot_usd_per_hour: PositiveFloat | None = None
    as_of: str
    """When that was so: ``2025`` or ``2026-11-21``."""
    source: str
    """Who says so."""


class Nodes(Spec):
    """How one kind of Kubernetes labels the nodes that have this hardware."""

    labels: dict[str, str]
    spot: dict[str, str] = Field(default_factory=dict[str, str])
    """Labels of those among them that may be taken away; without any, this kind has no spot nodes."""


class Toleration(Spec):
    """A taint that the pods put up with."""

    key: str
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


class Profile(Spec):
    """One machine."""

    name: str
    """The file's."""
    gpu: str | None = None
    """As Ray labels it (``ray.util.accelerators``); none: ranks train on CPUs."""
    gpus: Annotated[int, Field(ge=0)] = 0
    gpu_gib: Annotated[float, Field(ge=0)] = 0
    """Memory of one GPU that a program can have: what the driver reports, not what the box says."""
    tflops: PositiveFloat | None = None
    """Dense half-precision operations per second of one GPU, from its data sheet, in 10¹²."""
    bf16: bool = False
    """Whether its matrix units compute in bfloat16."""
    cores: PositiveFloat
    """CPU cores that pods can have of one machine; where a profile has no GPU: those of one worker."""
    ram_gib: PositiveFloat
    """Main memory, likewise."""
    disk_gib: PositiveInt
    """Local disk, likewise: downloaded weights, shards, Ray's files."""
    interconnect_gbps: PositiveFloat | None = None
    """Network between machines."""
    prices: tuple[Price, ...] = ()
    """The first one counts."""
    nodes: tuple[Nodes, ...] = ()
    """A Kubernetes node has to fit one of these; none: any node will do."""
    tolerations: tuple[Toleration, ...] = ()

    @property
    def gpu_bytes(self) -> int:
        """Memory of one GPU."""
        return int(self.gpu_gib * GIB)

    @property
    def peak_flops(self) -> float | None:
        """Half-precision operations per second of one GPU."""
        return self.tflops and self.tflops * 1e12


def find_profile(name: str, beside: Path | None = None) -> Profile:
    """The profile called ``name``.

    Args:
        name: as in ``cluster.profile``.
        beside: folder of the job file.

    Raises:
        JobError: there is none, or its file has faults (all of them, as ``file:line:column: …``).
    """
    return _read(name, _path(name, beside))


def text_of_own(name: str, beside: Path) -> str | None:
    """The file of a profile that somebody wrote, beside the job or at home; None for those of utaforge.

    Raises:
        JobError: there is no such profile.
    """
    path = _path(name, beside)
    return None if path.parent == _SHIPPED else path.read_text(encoding="utf-8")


def _path(name: str, beside: Path | None) -> Path:
    own = [beside / "profiles"] if beside else []
    places = [*own, Path("~/.config/utaforge/profiles").expanduser(), _SHIPPED]
    for place in places:
        path = place / f"{name}.yaml"
        if path.is_file():
            return path
    names = sorted({path.stem for place in places for path in place.glob("*.yaml")})
    near = get_close_matches(name, names, 1)
    raise JobError(
        f"cluster.profile: there is no {name}.yaml in {', '.join(map(str, places))}",
        (f"did you mean {near[0]}? " if near else "") + f"there are: {', '.join(names)}",
    )


def _read(name: str, path: Path) -> Profile:
    document = read(path)
    faults = list(document.faults)
    try:
        profile = Profile.model_validate_json(json.dumps({**document.data, "name": name}), strict=True)
    except ValidationError as error:
        faults += schema_faults(error, Profile, frozenset())
        raise JobError(document.report(faults)) from None
    if faults:
        raise JobError(document.report(faults))
    return profile


def cores_here() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0))


def ram_here() -> int:
    """Main memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gpus_here() -> int:
    """GPUs of this machine that ``nvidia-smi`` knows; 0 without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    try:
        told = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in told.stdout.splitlines()) if told.returncode == 0 else 0
