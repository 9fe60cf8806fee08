"""What is missing on this machine, and the cure."""

import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from launcher.profiles import GIB, gpus_here, ram_here
from trainer.spec import Job, UtaforgeError
from trainer.store import open_store

PYTHON = (3, 11)
DISK_BYTES = 10 * GIB
RAM_BYTES = 6 * GIB
SHARED_MEMORY_BYTES = GIB // 16
PACKAGES = (
    "torch",
    "torchaudio",
    "transformers",
    "peft",
    "deepspeed",
    "accelerate",
    "ray",
    "mlflow",
    "pyarrow",
    "soundfile",
)
SECONDS = 5.0


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        name: of the thing.
        ok: whether it will do.
        found: what is there.
        cure: what to do if it will not.
    """

    name: str
    ok: bool
    found: str
    cure: str = ""


def examine(store_url: str, job: Job | None = None) -> Iterator[Check]:
    """Look at everything a run needs, one thing after the other.

    Args:
        store_url: the store that has to be writable.
        job: whose MLflow server has to answer, if it names one.
    """
    version = sys.version_info
    found = ".".join(map(str, version[:3]))
    yield Check("python", version >= PYTHON, found, f"install Python {PYTHON[0]}.{PYTHON[1]} or newer")
    yield _program("g++", "DeepSpeed compiles an operator with it: apt install g++")
    yield _program("make", "the set-up is a Makefile: apt install make")
    yield from _packages()
    yield _space("disk", Path.cwd(), DISK_BYTES, "checkpoints and shards need room: free some, or work on another disk")
    yield _space("/tmp", Path("/tmp"), GIB, "Ray keeps its files there: free some space")  # noqa: S108
    yield _space("shared memory", Path("/dev/shm"), SHARED_MEMORY_BYTES, "start the container with --shm-size=1g")  # noqa: S108
    yield Check(
        "memory", ram_here() >= RAM_BYTES, _gib(ram_here()), "two workers need about 6 GiB: set cluster.workers: 1"
    )
    gpus = gpus_here()
    yield Check("GPUs", True, str(gpus) if gpus else "none (profile cpu works without)")
    yield _tried("ports", _ports, "end some of the programs that listen on the loopback")
    yield _tried(f"store {store_url}", lambda: _writable(store_url), "see the store's URL and permissions")
    if job and job.tracking.mlflow and job.tracking.mlflow.startswith("http"):
        url = job.tracking.mlflow
        yield _tried(
            f"MLflow {url}", lambda: _answers(url), "start it (make ui) or correct tracking.mlflow; runs wait for it"
        )


def _program(name: str, cure: str) -> Check:
    path = shutil.which(name)
    return Check(name, path is not None, path or "not found", cure)


def _packages() -> Iterator[Check]:
    for name in PACKAGES:
        version = None
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)
        yield Check(name, version is not None, version or "not installed", "run: make setup")


def _space(name: str, place: Path, needed: int, cure: str) -> Check:
    if not place.is_dir():
        return Check(name, False, f"{place} is not there", cure)
    free = shutil.disk_usage(place).free
    writable = os.access(place, os.W_OK)
    return Check(name, free >= needed and writable, f"{_gib(free)} free" if writable else f"{place} is read-only", cure)


def _tried(name: str, attempt: Callable[[], str], cure: str) -> Check:
    try:
        return Check(name, True, attempt())
    except UtaforgeError as error:
        return Check(name, False, error.problem, error.cure or cure)
    except OSError as error:
        return Check(name, False, str(error), cure)


def _ports() -> str:
    from launcher.backends.local import free_ports

    return f"{len(free_ports(8))} free ones found"


def _writable(store_url: str) -> str:
    open_store(store_url).check_writable()
    return "writable"


def _answers(url: str) -> str:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/version", timeout=SECONDS) as answer:  # noqa: S310  (http, checked)
            return f"version {answer.read(64).decode('utf-8', 'replace')}"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return "answers, and asks for a login"
        raise


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
