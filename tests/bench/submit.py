"""From ``utaforge submit`` (data prepared already) to the first optimizer step ÷ Ray alone to a printed line."""

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from launcher.backends.local import LOOPBACK, free_ports
from launcher.submit import environment

from .figure import ROOT, Figure, middle
from .runs import Bench, demo

log = logging.getLogger(__name__)
RANKS = 2
KEEPER = ROOT / "launcher" / "backends" / "keeper.py"
RAY = Path(sys.executable).with_name("ray")
_FIRST_STEP = re.compile(r"^step 1/\d+ · loss")


def measure(repeats: int = 5) -> Figure:
    """Both ways in turn; the figure is the median of the ratios of neighbours."""
    ours: list[dict[str, float]] = []
    bare: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="utaforge-bench-", dir="/tmp") as folder:
        bench = Bench(Path(folder), _job())
        bench.lines("warm")
        _bare()
        for turn in range(repeats):
            ours.append(_ours(bench, f"run-{turn}"))
            bare.append(_bare())
            log.info("turn %d/%d: ours %s, bare %s", turn + 1, repeats, _words(ours[-1]), _words(bare[-1]))
    totals = [sum(one.values()) for one in ours], [sum(one.values()) for one in bare]
    ratios = [one / other for one, other in zip(*totals, strict=True)]
    return Figure(
        name="submit",
        ours=f"{middle(totals[0])} s to the first optimizer step",
        rival=f"{middle(totals[1])} s to a line from Ray alone",
        value=median(ratios),
        most=1.3,
        details={
            "ours_seconds": totals[0],
            "bare_seconds": totals[1],
            "ratios": ratios,
            "ours_phases": {phase: median(one[phase] for one in ours) for phase in ours[0]},
            "bare_phases": {phase: median(one[phase] for one in bare) for phase in bare[0]},
        },
    )


def _job() -> dict[str, Any]:
    """The demo with a single step, so that it ends soon after what is measured."""
    job = demo()
    job["train"] |= {"steps": 1, "log_every": 1, "schedule": {"name": "constant", "warmup": 0}}
    job["validation"]["every"] = job["checkpoint"]["every"] = 1
    return job


def _ours(bench: Bench, name: str) -> dict[str, float]:
    """Seconds of each phase until the line of step 1 is read."""
    begin = time.time()
    lines = bench.lines(name)
    run = bench.run(name)
    attempt = json.loads((run / "attempts" / "0001.json").read_text(encoding="utf-8"))
    journal = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    first = next(entry["time"] for entry in journal if "metrics" in entry)
    heard = next(entry["time"] for entry in journal if "artifact" in entry)
    stepped = next(entry["time"] for entry in journal if entry["step"] == 1)
    seen = next(at for at, line in lines if _FIRST_STEP.match(line))
    starting = next(at for at, line in lines if line.startswith("starting Ray"))
    marks = {
        "plan": starting,
        "Ray": attempt["time"] - begin,
        "driver, ranks, held-out loss": first - begin,
        "songs of step 0": heard - begin,
        "step 1": stepped - begin,
        "until its line": seen,
    }
    return {phase: after - before for (_, before), (phase, after) in pairwise([("", 0.0), *marks.items()])}


def _bare() -> dict[str, float]:
    """Seconds of ``ray start`` and of ``ray job submit`` until a worker's line is read."""
    with tempfile.TemporaryDirectory(prefix="bare-", dir="/tmp") as folder:
        variables = {**os.environ, **environment(RANKS), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        variables.pop("RAY_ADDRESS", None)
        ports = free_ports(4)
        names = ("--port", "--dashboard-port", "--ray-client-server-port", "--dashboard-agent-listen-port")
        begin = time.perf_counter()
        with (Path(folder) / "start.log").open("w+", encoding="utf-8") as said:
            ray = subprocess.Popen(
                [sys.executable, "-I", "-S", str(KEEPER), f"{folder}/kept", str(RAY), "start", "--head", "--block",
                 f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}", f"--num-cpus={RANKS}",
                 f"--temp-dir={folder}/ray", *(f"{name}={port}" for name, port in zip(names, ports, strict=True))],
                stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, env=variables, start_new_session=True,
            )  # fmt: skip
            try:
                while "Ray runtime started" not in (Path(folder) / "start.log").read_text(encoding="utf-8"):
                    assert ray.poll() is None, "Ray did not start"
                    time.sleep(0.05)
                started = time.perf_counter() - begin
                _job_submit(f"http://{LOOPBACK}:{ports[1]}", folder, variables)
                return {"ray start": started, "ray job submit": time.perf_counter() - begin - started}
            finally:
                assert ray.stdin is not None
                ray.stdin.close()
                ray.wait()


def _job_submit(address: str, folder: str, variables: dict[str, str]) -> None:
    """Return when the first line of a worker has arrived."""
    script = [sys.executable, str(Path(__file__).with_name("bare_ray.py")), f"{folder}/results"]
    with subprocess.Popen(
        [str(RAY), "job", "submit", "--address", address, "--", *script],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**variables, "PYTHONUNBUFFERED": "1"},
    ) as job:  # fmt: skip
        assert job.stdout is not None
        told: list[str] = []
        try:
            for line in job.stdout:
                told.append(line)
                if "line of rank" in line:
                    return
        finally:
            job.kill()
    raise AssertionError("".join(["the workers printed no line\n", *told]))


def _words(phases: dict[str, float]) -> str:
    return f"{sum(phases.values()):.1f} s (" + ", ".join(f"{name} {s:.1f}" for name, s in phases.items()) + ")"
