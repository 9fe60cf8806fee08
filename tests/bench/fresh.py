"""From a fresh clone to the finished demo: seconds by phase, installs included."""

import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from .figure import ROOT, Figure
from .runs import timed_lines

LIMIT_MINUTES = 12.0
_PHASES = (
    ("install", "compiling DeepSpeed"),
    ("compile DeepSpeed's operator", "plan of demo"),
    ("plan", "starting Ray"),
    ("Ray and driver", "prepared 1/"),
    ("prepare the songs", "published version"),
    ("ranks", "step 0/"),
    ("train, with validation and songs", "run demo is finished"),
)
"""Each phase and how the line begins that ends it."""


def measure(repeats: int = 1) -> Figure:
    """Clone, ``make submit JOB=jobs/demo.yaml``; the package installer's cache counts as it is on this machine."""
    turns = [_once() for _ in range(repeats)]
    minutes = [sum(turn.values()) / 60 for turn in turns]
    best = turns[minutes.index(min(minutes))]
    phases: dict[str, Any] = {phase: round(seconds, 1) for phase, seconds in best.items()}
    return Figure(
        name="fresh",
        ours=f"{min(minutes):.1f} min from clone to finished demo",
        rival=f"{LIMIT_MINUTES:g} min",
        value=min(minutes),
        most=LIMIT_MINUTES,
        details={"seconds": phases, "minutes": minutes},
    )


def _once() -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="utaforge-bench-") as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        home = clone / ".utaforge"
        places = {"UTAFORGE_HOME": str(home), "TORCH_EXTENSIONS_DIR": str(home / "cache" / "torch_extensions")}
        lines = timed_lines(["make", "submit", "JOB=jobs/demo.yaml"], clone, places)
    marks = [("", 0.0)]
    for phase, beginning in _PHASES:
        marks.append((phase, next(at for at, line in lines if line.startswith(beginning))))
    marks.append(("summary", lines[-1][0]))
    return {phase: after - before for (_, before), (phase, after) in pairwise(marks)}
