"""What Ray, the engine, the journal and MLflow cost: speed of a submitted run ÷ speed of a bare loop.

Speed is tokens a second, since the last step of an epoch is a short one. The run and the bare loop take turns of
seconds on the same cores: while one is at it, everything that belongs to the other is stopped. So a machine that is
busy with other things, now more and now less, slows both alike.

One rank computes on one core. Ray's daemons and the tracking have the others, as they have beside a GPU.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from launcher.backends.local import free_ports
from launcher.submit import environment

from .figure import ROOT, Figure, middle
from .runs import Bench, demo

log = logging.getLogger(__name__)
RANKS, WARMUP_STEPS, STEPS = 1, 10, 10
"""Processes; steps of the bare loop before the first turn, and in each."""
ONE_CORE = {"OMP_NUM_THREADS": "1"}
TURN_SECONDS = 5.0
"""Of the run. Longer pauses in between would make Ray doubt its own processes."""
NICENESS = "15"
"""That Ray gives to its workers."""
MIRROR_SECONDS = 15.0
"""After which the store's copy of the journal has everything."""


def measure(repeats: int = 15) -> Figure:
    """``repeats`` turns of each; the figure is the median of the ratios of neighbouring turns."""
    with tempfile.TemporaryDirectory(prefix="utaforge-bench-") as folder, ExitStack() as stack:
        bench = Bench(Path(folder), _job(), ONE_CORE)
        bench.submit("warm", "train.steps=1")
        bare = stack.enter_context(_Bare(bench, WARMUP_STEPS + repeats * STEPS))
        bare(WARMUP_STEPS)
        run = stack.enter_context(bench.running("run", until=f"step {WARMUP_STEPS}/"))
        turns: list[tuple[float, float]] = []
        alone: list[tuple[float, float]] = []
        before = _cpu_seconds(run), _cpu_seconds(bare.process)
        for turn in range(repeats):
            begin = time.time()
            time.sleep(TURN_SECONDS)
            turns.append((begin, time.time()))
            with _stopped(run):
                alone.append(bare(STEPS))
            log.info("turn %d/%d", turn + 1, repeats)
        ours_cpu, bare_cpu = _cpu_seconds(run) - before[0], _cpu_seconds(bare.process) - before[1]
        time.sleep(MIRROR_SECONDS)
        steps = _steps(bench.run("run"))
    ours = [_speed(steps, *turn) for turn in turns]
    bare_speeds = [tokens / seconds for tokens, seconds in alone]
    ours_per_cpu = sum(tokens for at, tokens in steps if turns[0][0] < at <= turns[-1][1]) / ours_cpu
    bare_per_cpu = sum(tokens for tokens, _ in alone) / bare_cpu
    ratios = [one / other for one, other in zip(ours, bare_speeds, strict=True)]
    return Figure(
        name="apparatus",
        ours=f"{middle(ours)} tokens/s in Ray + engine + tracking",
        rival=f"{middle(bare_speeds)} tokens/s in a bare loop",
        value=median(ratios),
        least=0.95,
        details={
            "ours_tokens_per_second": ours,
            "bare_tokens_per_second": bare_speeds,
            "ratios": ratios,
            "ours_tokens_per_cpu_second": ours_per_cpu,
            "bare_tokens_per_cpu_second": bare_per_cpu,
            "cpu_ratio": ours_per_cpu / bare_per_cpu,
        },
    )


def _job() -> dict[str, Any]:
    """The demo, so long that it is still at it when all turns are over, with nothing but steps."""
    job = demo()
    job["train"] |= {"steps": 1_000_000, "log_every": 1, "schedule": {"name": "constant", "warmup": 0}}
    job["cluster"]["workers"] = RANKS
    job["checkpoint"], job["validation"] = {"every": 1_000_000}, {"every": 1_000_000}
    return job


def _steps(run: Path) -> list[tuple[float, float]]:
    """When each step was done, and its tokens, from the journal."""
    entries = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        (one["time"], told["speed/tokens_per_second"] / told["speed/steps_per_second"])
        for one in entries
        if "train/loss" in (told := one.get("metrics", {}))
    ]


def _speed(steps: list[tuple[float, float]], begin: float, end: float) -> float:
    """Tokens a second between the first and the last step of a turn."""
    inside = [step for step in steps if begin <= step[0] <= end]
    return sum(tokens for _, tokens in inside[1:]) / (inside[-1][0] - inside[0][0])


def _cpu_seconds(root: subprocess.Popen[str]) -> float:
    """What the process and its descendants have used so far."""
    process = psutil.Process(root.pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(time.user + time.system for time in times)


@contextmanager
def _stopped(root: subprocess.Popen[str]) -> Iterator[None]:
    """Nothing of the process and its descendants runs meanwhile."""
    process = psutil.Process(root.pid)
    family = [process, *process.children(recursive=True)]
    _signal(family, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(family, signal.SIGCONT)


def _signal(family: list[psutil.Process], name: signal.Signals) -> None:
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(name)


class _Bare:
    """The bare loop, waiting; call it with a number of steps for their tokens and seconds.

    It has a session of its own and Ray's niceness: both decide what a process gets of a busy machine.
    """

    def __init__(self, bench: Bench, steps: int) -> None:
        (port,) = free_ports(1)
        loop = ["-m", "tests.bench.bare_loop", str(bench.run("warm")), str(steps), str(RANKS), str(port)]
        self.process = subprocess.Popen(
            ["nice", "-n", NICENESS, sys.executable, *loop],
            cwd=ROOT,
            env={**os.environ, **environment(RANKS), **bench.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "_Bare":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def __call__(self, steps: int) -> tuple[float, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        tokens, seconds = self.process.stdout.readline().split()
        return float(tokens), float(seconds)
