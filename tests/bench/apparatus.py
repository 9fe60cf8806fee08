"""What Ray, the engine, the journal and MLflow cost: steps/s of a submitted run ÷ steps/s of a bare loop."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from launcher.backends.local import free_ports
from launcher.submit import environment

from .figure import ROOT, Figure, middle
from .runs import Bench, demo

log = logging.getLogger(__name__)
RANKS, STEPS, WARMUP = 2, 120, 20


def measure(repeats: int = 5) -> Figure:
    """Runs and bare loops in turn; the figure is the median of the ratios of neighbours."""
    ours: list[float] = []
    bare: list[dict[str, float]] = []
    losses: list[float] = []
    with tempfile.TemporaryDirectory(prefix="utaforge-bench-") as folder:
        bench = Bench(Path(folder), _job())
        bench.submit("warm", "train.steps=2")
        for turn in range(repeats):
            run = bench.submit(f"run-{turn}")
            speed, loss = _speed(run)
            ours.append(speed)
            losses.append(loss)
            bare.append(_bare(run, bench))
            log.info("turn %d/%d: %.2f and %.2f steps/s", turn + 1, repeats, speed, bare[-1]["steps_per_second"])
    speeds = [one["steps_per_second"] for one in bare]
    ratios = [one / other for one, other in zip(ours, speeds, strict=True)]
    return Figure(
        name="apparatus",
        ours=f"{middle(ours)} steps/s in Ray + engine + tracking",
        rival=f"{middle(speeds)} steps/s in a bare loop",
        value=median(ratios),
        least=0.95,
        details={
            "ours_steps_per_second": ours,
            "bare_steps_per_second": speeds,
            "ratios": ratios,
            "last_loss_ours": losses,
            "last_loss_bare": [one["loss"] for one in bare],
            "steps": STEPS,
            "warmup": WARMUP,
        },
    )


def _job() -> dict[str, Any]:
    job = demo()
    job["train"] |= {"steps": STEPS, "log_every": 10, "schedule": {"name": "constant", "warmup": 0}}
    job["checkpoint"], job["validation"] = {"every": STEPS}, {"every": STEPS}
    return job


def _speed(run: Path) -> tuple[float, float]:
    """Median of the speeds that the journal tells after the warm-up, and the last loss."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    told = [(one["step"], one["metrics"]) for one in entries if "train/loss" in one.get("metrics", {})]
    speeds = [metrics["speed/steps_per_second"] for step, metrics in told if step > WARMUP]
    return median(speeds), told[-1][1]["train/loss"]


def _bare(run: Path, bench: Bench) -> dict[str, float]:
    (port,) = free_ports(1)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.bench.bare_loop", str(run), str(rank), str(RANKS), str(port), str(WARMUP)],
            cwd=ROOT,
            env={**os.environ, **environment(RANKS), **bench.environment},
            stdout=subprocess.PIPE,
        )
        for rank in range(RANKS)
    ]
    told = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), "a bare rank failed"
    ranks = [json.loads(one.splitlines()[-1]) for one in told]
    return {
        "steps_per_second": ranks[0]["steps_per_second"],
        "loss": sum(rank["loss"] for rank in ranks) / RANKS,
    }
