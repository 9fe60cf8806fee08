"""Hardware shapes: what a job may ask for by name."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Profile:
    """One machine.

    Attributes:
        name: as in ``cluster.profile``.
        gpu: its GPU, as Ray labels it (``ray.util.accelerators``); None without.
        gpus: how many.
        gpu_bytes: memory of one GPU that a program can have: what the driver reports, not what the box says.
        peak_flops: dense half-precision operations per second of one GPU, from its data sheet; None where unknown.
        bf16: whether its matrix units compute in bfloat16.
        cores: CPU cores; None where the machine decides.
        ram_bytes: main memory; None where the machine decides.
        usd_per_hour: on demand, list price of the machine named in ``priced_as``; None where nobody sends a bill.
        priced_as: provider, machine and region of that price.
    """

    name: str
    gpu: str | None = None
    gpus: int = 0
    gpu_bytes: int = 0
    peak_flops: float | None = None
    bf16: bool = False
    cores: int | None = None
    ram_bytes: int | None = None
    usd_per_hour: float | None = None
    priced_as: str = ""


PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("cpu"),
        Profile("t4x4", "T4", 4, int(14.6 * GIB), 65e12, False, 48, 192 * GIB, 3.912, "AWS g4dn.12xlarge, us-east-1"),
        Profile(
            "a100", "A100", 1, int(79.2 * GIB), 312e12, True, 12, 170 * GIB, 5.07, "GCP a2-ultragpu-1g, us-central1"
        ),
        Profile(
            "a100-40", "A100", 1, int(39.4 * GIB), 312e12, True, 12, 85 * GIB, 3.67, "GCP a2-highgpu-1g, us-central1"
        ),
        Profile("rtx4090", "GeForce-RTX-4090", 1, int(23.5 * GIB), 165e12, True),
    )
}
"""All profiles, by name."""


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
