"""What a bench finds, where it was found, and how both are told."""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results")


@dataclass(frozen=True)
class Figure:
    """One figure and what it is judged by.

    Attributes:
        name: of the figure.
        ours: what was measured, in words with its unit.
        rival: what it is held against, in words with its unit.
        value: the figure itself; None if this machine cannot tell.
        least: the smallest that will do; None if there is no such limit.
        most: the largest that will do; None if there is no such limit.
        details: everything measured, for the result file.
    """

    name: str
    ours: str
    rival: str
    value: float | None
    least: float | None = None
    most: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def limit(self) -> str:
        """The limit, for people."""
        return f"≥ {self.least:g}" if self.least is not None else f"≤ {self.most:g}" if self.most is not None else ""

    @property
    def reached(self) -> bool:
        """Whether the figure keeps its limit."""
        if self.value is None:
            return False
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)


def middle(values: Sequence[float]) -> str:
    """Median and range, for people."""
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def machine(packages: Sequence[str] = ("torch", "ray", "transformers", "peft", "mlflow")) -> dict[str, Any]:
    """This machine, without anything that names it."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "date": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "commit": _git("rev-parse", "--short=12", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
    }


def save(name: str, figure: Figure, before: Mapping[str, Any]) -> None:
    """Write ``results/<name>.json``; ``before`` is the machine as it was when the bench began."""
    told = {"machine": before, "load_average_after": [round(load, 2) for load in os.getloadavg()], **asdict(figure)}
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(told, ensure_ascii=False, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def show(figures: Sequence[Figure], where: Mapping[str, Any]) -> None:
    """Print the machine and the table."""
    console = Console()
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    gpu = f"{where['gpu']}, {where['gpu_gib']} GiB; " if "gpu" in where else ""
    console.print(
        f"{gpu}{where['cpu']}, {where['cores']} cores, {where['ram_gib']} GiB, load {where['load_average'][0]}; "
        f"python {where['python']}, {packages}; commit {where['commit']}, {where['date']}",
        highlight=False,
    )
    table = Table("figure", "measured", "beside", "value", "limit", "", show_lines=True)
    for one in figures:
        mark = "" if not one.limit else "reached" if one.reached else "missed"
        value = "unknown" if one.value is None else f"{one.value:.3f}"
        table.add_row(one.name, one.ours, one.rival, value, one.limit, mark)
    console.print(table)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
