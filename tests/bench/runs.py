"""Submitting the demo from a folder of its own, as people do, with the time of every line."""

import collections
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .figure import ROOT

UTAFORGE = Path(sys.executable).with_name("utaforge")


def demo() -> dict[str, Any]:
    """``jobs/demo.yaml``."""
    return yaml.safe_load((ROOT / "jobs" / "demo.yaml").read_text(encoding="utf-8"))


class Bench:
    """A folder with a job, its store, and a home for what runs on a machine share.

    Args:
        folder: an empty one.
        job: a job file's content.
        environment: variables for what runs in it.
    """

    def __init__(self, folder: Path, job: dict[str, Any], environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.environment = {"UTAFORGE_HOME": str(folder / "home"), **(environment or {})}
        (folder / "job.yaml").write_text(yaml.safe_dump(job, allow_unicode=True), encoding="utf-8")

    def submit(self, name: str, *overrides: str) -> Path:
        """Run the job to its end under the run name ``name``; returns its run directory."""
        self.lines(name, *overrides)
        return self.run(name)

    def run(self, name: str) -> Path:
        """The run directory of ``name``."""
        return self.folder / "store" / "runs" / name

    @contextmanager
    def running(self, name: str, until: str) -> Iterator[subprocess.Popen[str]]:
        """The job at work, from when a line begins with ``until``; interrupted afterwards."""
        with subprocess.Popen(
            self._command(name),
            cwd=self.folder,
            env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            told = list(itertools.takewhile(lambda line: not line.startswith(until), process.stdout))
            assert process.poll() is None, "".join(told)
            drain = threading.Thread(target=collections.deque, args=(process.stdout, 0), daemon=True)
            drain.start()
            try:
                yield process
            finally:
                process.send_signal(signal.SIGINT)
                drain.join()

    def lines(self, name: str, *overrides: str) -> list[tuple[float, str]]:
        """Run the job to its end; what it says, with the seconds since its start."""
        return timed_lines(self._command(name, *overrides), self.folder, self.environment)

    def _command(self, name: str, *overrides: str) -> list[str]:
        options = [part for override in overrides for part in ("--set", override)]
        return [str(UTAFORGE), "submit", "job.yaml", "--yes", "--run", name, *options]


def timed_lines(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> list[tuple[float, str]]:
    """What ``command`` says until its end, with the seconds since its start."""
    begin = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        told = [(time.perf_counter() - begin, line.rstrip()) for line in process.stdout]
    said = "\n".join(line for _, line in told)
    assert process.returncode == 0, f"{command[0]} ended with {process.returncode}:\n{said}"
    return told
